import openai
import pytest
from assistant import Assistant


@pytest.fixture
def assistant(gateway):
    url, keys = gateway

    def assistant(key, model="small"):
        return Assistant(url, keys.get(key, key), model)

    return assistant


def test_a_question_is_answered(assistant):
    assert assistant("chat").ask("one two three") == "one two three"


def test_an_answer_comes_in_pieces(assistant):
    pieces = list(assistant("chat").ask_aloud("one two three"))
    assert len(pieces) > 1
    assert "".join(pieces) == "one two three"


def test_the_nearest_entry_is_found(assistant):
    assert assistant("chat").nearest("tea", ["coffee", "tea"]) == "tea"


def test_another_model_answers_where_one_is_down(assistant):
    assert assistant("chat", "shaky").ask("one two three") == "one two three"


def test_a_key_reaches_its_models_only(assistant):
    with pytest.raises(openai.APIStatusError) as refused:
        assistant("chat", "large").ask("one")
    assert refused.value.status_code == 403
    assert {each.id for each in assistant("chat").ai.models.list()} == {"small", "shaky", "embed"}


def test_an_unknown_key_is_refused(assistant):
    with pytest.raises(openai.AuthenticationError):
        assistant("sk-nobody").ask("one")


def test_a_key_has_two_requests_a_minute(assistant):
    slow = assistant("slow")
    slow.ask("one")
    slow.ask("two")
    with pytest.raises(openai.RateLimitError):
        slow.ask("three")


def test_a_key_whose_budget_is_spent_is_refused(assistant):
    with pytest.raises(openai.RateLimitError, match=r"(?i)budget"):
        assistant("poor").ask("one")


def test_what_an_answer_cost_is_said(assistant):
    answer = assistant("chat").ai.chat.completions.create(
        model="small", messages=[{"role": "user", "content": "one two three"}], max_tokens=3
    )
    usage = answer.usage
    cost = 0.15e-6 * usage.prompt_tokens + 0.6e-6 * usage.completion_tokens
    assert answer.aiqueue["cost"] == pytest.approx(cost)

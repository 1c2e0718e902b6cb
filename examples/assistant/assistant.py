"""A help desk's assistant, which knows of its gateway only an address, a key and names of models."""

from collections.abc import Iterator

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam


class Assistant:
    """Answers questions, and finds the entry that is most like one."""

    def __init__(self, base_url: str, key: str, model: str = "small") -> None:
        self.ai = OpenAI(base_url=base_url, api_key=key, max_retries=0)
        self.model = model

    def ask(self, question: str, words: int = 3) -> str:
        messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": question}]
        answer = self.ai.chat.completions.create(model=self.model, messages=messages, max_tokens=words)
        return answer.choices[0].message.content or ""

    def ask_aloud(self, question: str, words: int = 3) -> Iterator[str]:
        messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": question}]
        answer = self.ai.chat.completions.create(model=self.model, messages=messages, max_tokens=words, stream=True)
        for chunk in answer:
            if chunk.choices and chunk.choices[0].delta.content:
                yield chunk.choices[0].delta.content

    def nearest(self, question: str, entries: list[str]) -> str:
        found = self.ai.embeddings.create(model="embed", input=[question, *entries]).data
        asked, *others = (each.embedding for each in found)
        likeness = [sum(a * b for a, b in zip(asked, each, strict=True)) for each in others]
        return max(zip(likeness, entries, strict=True))[1]

"""Settings, and where they come from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from aiqueue.config import Settings, SettingsOptions, find_file
from aiqueue.errors import SettingsError


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory, and no setting in the environment."""
    for name in list(os.environ):
        if name.upper().startswith("AIQUEUE_") or name.upper() in ("NATS_URL", "URL"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def write(text: str, where: str = "aiqueue.toml") -> Path:
    path = Path(where)
    path.write_text(text)
    return path.resolve()


def write_context(name: str, /, **context: Any) -> Path:
    path = Path(os.environ["XDG_CONFIG_HOME"]) / "nats" / "context" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(context))
    return path


def refusal(**arguments: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        Settings.load(**arguments)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# where a value comes from


def test_without_anything_the_defaults_are_in_force() -> None:
    settings = Settings.load()
    assert (settings.url, settings.servers, settings.ping_interval, settings.profile) == (None, [], 2.0, "single")


@pytest.mark.parametrize(("name", "values"), [("user", ["f", "e", "a"]), ("ping_interval", [3.0, 4.0, 5.0]),
                                              ("url", ["nats://f", "nats://e", "nats://a"])])  # fmt: skip
def test_arguments_go_over_the_environment_over_the_file(
    name: str, values: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_file, in_environment, argument = values
    write(f"{name} = {json.dumps(in_file)}")
    assert getattr(Settings.load(), name) == in_file
    monkeypatch.setenv(f"AIQUEUE_{name.upper()}", str(in_environment))
    assert getattr(Settings.load(), name) == in_environment
    assert getattr(Settings.load(**{name: argument}), name) == argument


def test_size_families_and_overlay_come_from_each_source_and_say_from_which(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (Settings.load().size, Settings.load().families, Settings.load().overlay) == ("medium", None, {})
    path = write('size = "small"\nfamilies = ["rag.ingest"]\n[overlay."rag.ingest"]\nstream.max_bytes = "9MiB"')
    settings = Settings.load()
    assert (settings.size, settings.families) == ("small", ("rag.ingest",))
    assert settings.overlay == {"rag.ingest": {"stream": {"max_bytes": "9MiB"}}}
    assert settings.place("overlay") == (str(path), "overlay")
    monkeypatch.setenv("AIQUEUE_SIZE", "large")
    monkeypatch.setenv("AIQUEUE_FAMILIES", "agent.tasks, default")
    monkeypatch.setenv("AIQUEUE_OVERLAY", "dead.stream.max_age = '7d'")
    settings = Settings.load()
    assert (settings.size, settings.families) == ("large", ("agent.tasks", "default"))
    assert settings.overlay == {"dead": {"stream": {"max_age": "7d"}}}
    assert settings.place("families") == ("environment variable AIQUEUE_FAMILIES", "")
    monkeypatch.setenv("AIQUEUE_OVERLAY", '{"dead": {"stream": {"max_age": "8d"}}}')
    assert Settings.load().overlay == {"dead": {"stream": {"max_age": "8d"}}}
    settings = Settings.load(size="medium", families=["agent.message"], overlay={})
    assert (settings.size, settings.families, settings.overlay) == ("medium", ("agent.message",), {})
    assert settings.place("families") == ("argument families", "")


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("size", "tiny", "argument size: Input should be 'small', 'medium' or 'large'"),
        ("families", 3, "argument families: must be a list of families"),
        ("families", ["agent.tasks", ""], "argument families: must be a list of families"),
        ("families", "", "argument families: must be a list of families"),
        ("overlay", 3, "argument overlay: must be tables by family or role"),
        ("overlay", "{dead}", "argument overlay: must be TOML such as dead.stream.max_age = '7d', or JSON: Expecting"),
        ("overlay", "dead", "argument overlay: must be TOML such as dead.stream.max_age = '7d', or JSON"),
    ],
)
def test_a_wrong_size_list_of_families_or_overlay_is_one_line(name: str, value: object, problem: str) -> None:
    assert refusal(**{name: value}).startswith(problem)


def test_nats_url_is_the_address_too_and_ours_goes_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    write('url = "nats://file"')
    monkeypatch.setenv("NATS_URL", "nats://customary")
    assert Settings.load().url == "nats://customary"
    monkeypatch.setenv("AIQUEUE_URL", "nats://ours")
    assert Settings.load().url == "nats://ours"


def test_a_variable_that_is_merely_called_url_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("URL", "http://some.web.app")
    monkeypatch.setenv("USER", "me")
    monkeypatch.setenv("TOKEN", "t")
    settings = Settings.load()
    assert (settings.url, settings.user, settings.token) == (None, None, None)


def test_an_argument_of_none_counts_as_not_given() -> None:
    write('user = "f"')
    assert Settings.load(user=None, url=None).user == "f"


def test_the_nearest_file_upwards_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / "work" / "a" / "b"
    deep.mkdir(parents=True)
    far, near = write('user = "far"'), write('name = "near"', "a/aiqueue.toml")
    monkeypatch.chdir(deep)
    assert find_file() == near
    assert (Settings.load().name, Settings.load().user) == ("near", None)
    near.unlink()
    assert find_file() == far
    assert Settings.load().user == "far"


def test_paths_in_a_file_are_relative_to_the_file_and_know_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write('streams = "mine"\ntls_ca = "/etc/ca.pem"\ncreds = "~/my.creds"')
    (tmp_path / "work" / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "work" / "sub")
    settings = Settings.load()
    assert settings.streams == path.parent / "mine"
    assert settings.tls_ca == Path("/etc/ca.pem")
    assert settings.creds == tmp_path / "home" / "my.creds"


def test_a_path_from_the_environment_knows_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIQUEUE_NKEY", "~/seed")
    assert Settings.load().nkey == tmp_path / "home" / "seed"


def test_several_addresses_are_separated_by_commas() -> None:
    assert Settings.load(url="nats://a:1, nats://b:2,,").servers == ["nats://a:1", "nats://b:2"]


def test_a_setting_says_where_it_was_taken_from(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.load().source("url") == "default"
    path = write('url = "nats://f"\nembedded = "never"')
    assert (Settings.load().source("url"), Settings.load().source("embedded")) == (str(path), str(path))
    monkeypatch.setenv("NATS_URL", "nats://e")
    assert Settings.load().source("url") == "environment variable NATS_URL"
    monkeypatch.setenv("aiqueue_Url", "nats://o")
    assert Settings.load().source("url") == "environment variable aiqueue_Url"
    assert Settings.load(url="nats://a").source("url") == "argument url"
    write_context("prod", url="nats://c", user="u")
    settings = Settings.load(context="prod", user="mine")
    assert [settings.source(each) for each in ("url", "user", "embedded")] == [
        "nats context prod", "argument user", str(path),
    ]  # fmt: skip


# wrong ones


@pytest.mark.parametrize("empty", ["", " ", ",", " , "])
def test_an_empty_address_is_refused_and_not_taken_for_none(empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(url=empty).startswith("argument url: is empty: set it to a server's URL")
    path = write(f'url = "{empty}"\ncontext = "prod"')
    assert refusal().startswith(f"{path}: url: is empty")
    monkeypatch.setenv("NATS_URL", empty)
    assert refusal().startswith("environment variable NATS_URL: is empty")
    monkeypatch.setenv("AIQUEUE_URL", empty)
    monkeypatch.setenv("NATS_URL", "nats://a")
    assert refusal().startswith("environment variable AIQUEUE_URL: is empty")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("ping_interval", "soon"), ("ping_interval", 0), ("ping_interval", -1), ("connect_timeout", "0s"),
     ("embedded", "sometimes"), ("embedded", ""), ("profile", "galaxy"),
     ("tls_handshake_first", "perhaps"), ("inbox_prefix", "a b"), ("inbox_prefix", "a.*"),
     ("inbox_prefix", "a\r\nPUB b 0\r\n"), ("inbox_prefix", "a..b"), ("inbox_prefix", "a" * 201)],
)  # fmt: skip
def test_a_wrong_value_is_refused_naming_where_it_came_from(
    name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refusal(**{name: wrong}).startswith(f"argument {name}: ")
    path = write(f"{name} = {json.dumps(wrong)}")
    assert refusal().startswith(f"{path}: {name}: ")
    monkeypatch.setenv(f"AIQUEUE_{name.upper()}", str(wrong))
    assert refusal().startswith(f"environment variable AIQUEUE_{name.upper()}: ")


@pytest.mark.parametrize("wrong", [5, ["nats://a"], {"a": 1}])
def test_an_address_of_the_wrong_type_is_refused(wrong: Any) -> None:
    assert refusal(url=wrong).startswith("argument url: ")


def test_an_unknown_argument_is_refused_with_those_known() -> None:
    assert "argument colour: unknown setting; known: claim_check, connect_timeout" in refusal(colour=1)


def test_an_unknown_key_is_refused_with_its_file() -> None:
    path = write("colour = 1")
    assert refusal().startswith(f"{path}: unknown key 'colour'; known: ")


def test_a_misspelt_setting_is_answered_with_the_right_one() -> None:
    assert refusal(familys=["a.b"]).endswith("unknown setting; did you mean families?")
    path = write('sizes = "small"')
    assert refusal() == f"{path}: unknown key 'sizes'; did you mean size?"


def test_settings_as_the_address_are_refused_with_the_argument_that_takes_them() -> None:
    assert refusal(url=Settings()) == "argument url: is the address of a server: pass settings as settings="


@pytest.mark.parametrize("name", ["directory", "streams", "creds", "tls_ca"])
def test_an_empty_path_is_refused_and_not_the_working_directory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = f"{name}: is empty: set it to a path, or leave it out"
    assert refusal(**{name: ""}) == f"argument {problem}"
    path = write(f'{name} = ""')
    assert refusal() == f"{path}: {problem}"
    path.unlink()
    monkeypatch.setenv(f"AIQUEUE_{name.upper()}", "")
    assert refusal() == f"environment variable AIQUEUE_{name.upper()}: is empty: set it to a path, or leave it out"


@pytest.mark.parametrize("text", ["not toml", "a = 'x", "a = 1\na = 2"])
def test_a_file_that_is_no_toml_is_refused_naming_it(text: str) -> None:
    path = write(text)
    assert refusal().startswith(f"{path}: ")


def test_a_file_that_is_no_text_is_refused_naming_it() -> None:
    Path("aiqueue.toml").write_bytes(b"\xff\xfe")
    assert "aiqueue.toml: " in refusal()


# secrets


def test_no_secret_is_in_the_repr_the_text_or_the_addresses() -> None:
    settings = Settings.load(url="nats://me:sekret@a:1,tls://sekret@b", password="sekret", token="sekret")
    assert "sekret" not in repr(settings) + str(settings) + settings.addresses
    assert settings.addresses == "nats://a:1, tls://b:4222"
    assert settings.servers == ["nats://a:1", "tls://b:4222"]
    assert settings.password is not None
    assert settings.password.get_secret_value() == "sekret"


def credentials(url: str) -> dict[str, tuple[str | None, ...]]:
    def plain(secret: Any) -> str | None:
        return None if secret is None else secret.get_secret_value()

    found = Settings.load(url=url).url_credentials
    return {server: (each.user, plain(each.password), plain(each.token)) for server, each in found.items()}


def test_credentials_in_an_address_are_decoded_and_those_of_the_first_come_first() -> None:
    assert credentials("nats://bob:p%40ss%2Fw%25rd@a, b:1") == {"nats://a:4222": ("bob", "p@ss/w%rd", None)}
    assert credentials("nats://b%3Aob:x@a") == {"nats://a:4222": ("b:ob", "x", None)}
    assert credentials("nats://t%40ken@[::1]:7") == {"nats://[::1]:7": (None, None, "t@ken")}
    assert credentials("bob:x@y:z@a") == {"nats://a:4222": ("bob", "x@y:z", None)}
    assert credentials("nats://bob:@a") == {"nats://a:4222": ("bob", "", None)}
    two = credentials("nats://a:1@one,tls://b:2@two")
    assert [*two.values()] == [("a", "1", None), ("b", "2", None)]
    assert credentials("nats://a,b") == {}


@pytest.mark.parametrize(
    "url",
    [
        "nats://bob:sekret@a nats://bob:sekret@b", "nats://bob:sekret@a;nats://bob:sekret@b",
        "nats://bob:sekret@a|nats://bob:sekret@b", "nats://bob:se/kret@a", "nats://bob:sekret@a:port",
        "nats://bob:sekret@a:99999", "nats://bob:sekret@", "nats://bob:sekret@a\nnats://b", "nats://bob:sek,ret@a",
        "nats://bob:1,sekret@a", "nats://bob:x@1,sekret@a", "redis://bob:sekret@a", "http://bob:sekret@a",
        "bob:sekret", "nats://bob:sekret", "nats//bob:sekret@a", "nats://a/bob:sekret@b", "nats://bob:sek ret@a",
        "nats://bob:sekret@a?x=1", "nats://bob:sekret@a/path", "nats://bob:sekret#@a",
    ],
)  # fmt: skip
@pytest.mark.parametrize("way", ["argument", "environment", "file", "context", "class"])
def test_whatever_the_form_of_an_address_its_password_is_not_repeated(
    url: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "environment":
        monkeypatch.setenv("NATS_URL", url)
    elif way == "file":
        write(f"url = {json.dumps(url)}")
    elif way == "context":
        write_context("prod", url=url)
    if way == "class":
        with pytest.raises(ValueError, match="url") as caught:
            Settings(url=url)
        text = str(caught.value)
    else:
        arguments = {"argument": {"url": url}, "context": {"context": "prod"}}.get(way, {})
        text = refusal(**arguments)
        where = {"argument": "argument url", "environment": "NATS_URL", "file": "aiqueue.toml: url"}
        assert where.get(way, "prod.json: url: ") in text
    assert "sekret" not in text
    assert "kret" not in text
    assert "ret@" not in text


@pytest.mark.parametrize("scheme", ["http", "redis", "amqp", "https"])
def test_another_systems_address_is_refused_by_its_scheme(scheme: str) -> None:
    assert f"not an address of NATS ({scheme}://): use nats://, tls://, ws://, wss://" in refusal(url=f"{scheme}://a")


@pytest.mark.parametrize("name", ["password", "token"])
def test_a_wrong_secret_is_refused_without_repeating_it(name: str) -> None:
    assert "12345678" not in refusal(**{name: 12345678})


# contexts of the nats command line tool


def test_a_context_gives_address_and_credentials() -> None:
    write_context(
        "prod", url="nats://prod:4222", user="u", password="p", creds="~/prod.creds", ca="/ca.pem", description="x"
    )
    settings = Settings.load(context="prod")
    assert (settings.url, settings.user, settings.tls_ca) == ("nats://prod:4222", "u", Path("/ca.pem"))
    assert settings.password is not None
    assert settings.password.get_secret_value() == "p"
    assert settings.creds == Path("~/prod.creds").expanduser()


def test_a_context_gives_inbox_prefix_and_tls_first_and_what_changes_no_connection_is_fine() -> None:
    write_context(
        "prod", url="nats://a", inbox_prefix="_mine", tls_first=True, name="prod", description="d", color_scheme="red",
        socks_proxy="", nsc="", jetstream_api_prefix="$JS.API", windows_ca_certs_match=None,
    )  # fmt: skip
    settings = Settings.load(context="prod")
    assert (settings.inbox_prefix, settings.tls_handshake_first) == ("_mine", True)


@pytest.mark.parametrize(
    "key",
    ["jetstream_domain", "jetstream_api_prefix", "jetstream_event_prefix", "socks_proxy", "user_jwt", "user_seed",
     "nsc", "windows_cert_store", "windows_cert_match", "windows_ca_certs_match", "of_tomorrow"],
)  # fmt: skip
def test_what_a_context_demands_and_aiqueue_cannot_do_is_refused_by_name(key: str) -> None:
    path = write_context("leaf", url="nats://a", **{key: "sekret"})
    text = refusal(context="leaf")
    assert text.startswith(f"{path}: aiqueue does not support {key} of a nats context: ")
    assert "sekret" not in text


def test_what_is_set_beside_a_context_goes_over_it() -> None:
    write_context("prod", url="nats://prod:4222", user="u")
    assert Settings.load(context="prod", user="me").user == "me"


def test_the_nearer_of_context_and_address_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    write_context("prod", url="nats://prod")
    write('url = "nats://file"')
    assert Settings.load(context="prod").url == "nats://prod"
    monkeypatch.setenv("AIQUEUE_CONTEXT", "prod")
    assert Settings.load().url == "nats://prod"
    assert Settings.load(url="nats://argument").url == "nats://argument"
    monkeypatch.setenv("NATS_URL", "nats://environment")
    assert Settings.load().url == "nats://environment"
    assert Settings.load(context="prod").url == "nats://prod"


def test_a_context_that_is_not_there_is_refused_with_those_that_are() -> None:
    write_context("prod", url="nats://prod")
    write_context("dev", url="nats://dev")
    assert "there is no nats context 'stage'" in refusal(context="stage")
    assert refusal(context="stage").endswith("known: dev, prod")


@pytest.mark.parametrize("context", [[], {"user": "u"}, {"url": ""}])
def test_a_context_without_an_address_is_refused_naming_its_file(context: Any) -> None:
    path = write_context("bad")
    path.write_text(json.dumps(context))
    assert refusal(context="bad").startswith(f"{path}: ")


@pytest.mark.parametrize("text", ["{", '{"url": 5}', '{"url": "nats://x", "user": ["x"]}'])
def test_a_broken_context_is_refused_naming_its_file(text: str) -> None:
    path = write_context("bad")
    path.write_text(text)
    assert refusal(context="bad").startswith(f"{path}: ")


def test_settings_cannot_be_changed() -> None:
    settings = Settings.load()
    with pytest.raises(ValueError, match="frozen"):
        settings.url = "x"  # type: ignore[misc]


def test_type_checkers_know_every_setting_as_an_argument() -> None:
    assert {"url", *SettingsOptions.__annotations__} == set(Settings.model_fields)


def test_none_in_the_environment_takes_away_what_the_file_says_but_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    path = write('creds = "c"\nuser = "u"\npassword = "p"\ntls_ca = "ca.pem"\nstreams = "s"\nfamilies = ["a.b"]\n')
    assert str(Settings.load().creds) == str(path.parent / "c")
    names = ("creds", "user", "password", "tls_ca", "streams", "families", "directory")
    for name in names:
        monkeypatch.setenv(f"AIQUEUE_{name.upper()}", "none")
    settings = Settings.load()
    assert {getattr(settings, name) for name in names} == {None}
    monkeypatch.setenv("AIQUEUE_URL", "none")  # a host of this name
    assert Settings.load().servers == ["nats://none:4222"]
    monkeypatch.setenv("AIQUEUE_SIZE", "none")
    assert refusal().startswith("environment variable AIQUEUE_SIZE: ")


def test_settings_pass_as_plain_data_to_a_process_in_which_other_ones_are_stated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = Settings.load(
        url="nats://u:p@host", password="secret", tls_ca="ca.pem", families=["agent.tasks"], connect_timeout="7s",
        overlay={"dead": {"stream": {"max_age": "7d"}}}, claim_check="1KiB",
    )  # fmt: skip
    plain = json.loads(json.dumps(settings.to_plain()))
    write('creds = "prod.creds"\nprofile = "cluster"\n')
    monkeypatch.setenv("AIQUEUE_TOKEN", "other")
    found = Settings.of_plain(plain)
    assert found.model_dump() == settings.model_dump() | {"tls_ca": Path("ca.pem").absolute()}

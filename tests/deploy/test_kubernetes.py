"""The Kubernetes example: valid by the schemas of Kubernetes, and what its containers run works."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aiqueue.cli.app import app as cli
from aiqueue.config import Settings

from ..support import ROOT, Account

kubernetes_validate = pytest.importorskip(
    "kubernetes_validate", reason="kubernetes-validate is not installed: make test"
)
yaml = pytest.importorskip("yaml")

FILES = sorted((ROOT / "deploy/kubernetes").glob("*.yaml"))
MANIFESTS = [path for path in FILES if path.name != "kustomization.yaml"]
VERSIONS = ("1.30", "1.34")
DRAIN_S, END_S = 30, 10


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "deploy/kubernetes" / name).read_text())
    return found


def pod_of(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["spec"]["template"]["spec"]
    return found


def container_of(manifest: dict[str, Any]) -> dict[str, Any]:
    (found,) = pod_of(manifest)["containers"]
    return dict(found)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_each_manifest_is_valid_and_has_no_unknown_field(path: Path, version: str) -> None:
    for manifest in yaml.safe_load_all(path.read_text()):
        kubernetes_validate.validate(manifest, version, strict=True)


def test_a_misspelled_field_would_be_found() -> None:
    manifest = load("worker.yaml")
    manifest["spec"]["template"]["spec"]["terminationGracePeriod"] = 60
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)


def test_the_kustomization_names_every_manifest_but_the_secret() -> None:
    assert {*load("kustomization.yaml")["resources"], "secret.yaml"} == {each.name for each in MANIFESTS}


def test_kubectl_renders_the_kustomization() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl")
    ran = subprocess.run(
        ["kubectl", "kustomize", str(ROOT / "deploy/kubernetes")],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    kinds = sorted(each["kind"] for each in yaml.safe_load_all(ran.stdout))
    assert kinds == ["ConfigMap", "Deployment", "Job"]


@pytest.mark.parametrize("name", ["apply.yaml", "worker.yaml"])
def test_pods_run_without_rights_on_a_file_system_that_they_cannot_write(name: str) -> None:
    pod, container = pod_of(load(name)), container_of(load(name))
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False


def test_a_worker_has_time_to_drain_before_it_is_killed() -> None:
    arguments = container_of(load("worker.yaml"))["args"]
    assert arguments[arguments.index("--drain-timeout") + 1] == f"{DRAIN_S}s"
    assert pod_of(load("worker.yaml"))["terminationGracePeriodSeconds"] >= DRAIN_S + END_S + 10


def test_what_a_pod_mounts_is_what_its_settings_name_and_what_the_secret_has() -> None:
    secret = load("secret.yaml")
    for name in ("apply.yaml", "worker.yaml"):
        pod, container = pod_of(load(name)), container_of(load(name))
        creds = next(each["value"] for each in container["env"] if each["name"] == "AIQUEUE_CREDS")
        mount = next(each for each in container["volumeMounts"] if each["name"] == "creds")
        volume = next(each["secret"] for each in pod["volumes"] if each["name"] == "creds")
        assert volume["secretName"] == secret["metadata"]["name"]
        (item,) = volume["items"]
        assert item["key"] in secret["stringData"]
        assert creds == f"{mount['mountPath']}/{item['path']}"


def test_every_variable_is_a_setting() -> None:
    settings = {f"AIQUEUE_{name.upper()}" for name in Settings.model_fields} | {"NATS_URL", "AIQUEUE_HEALTH_FILE"}
    names = set(load("config.yaml")["data"])
    for name in ("apply.yaml", "worker.yaml"):
        names |= {each["name"] for each in container_of(load(name))["env"]}
    assert names <= settings


def commands_of(name: str) -> list[list[str]]:
    container = container_of(load(name))
    probes = [each["exec"]["command"][1:] for key, each in container.items() if key.endswith("Probe")]
    return [container["args"], *probes]


@pytest.mark.parametrize("words", [*commands_of("apply.yaml"), *commands_of("worker.yaml")], ids=shlex.join)
def test_the_command_line_accepts_what_containers_and_probes_run(words: list[str]) -> None:
    import typer.main  # noqa: PLC0415

    group = typer.main.get_command(cli)
    name, *rest = words
    command = group.commands[name]  # type: ignore[attr-defined]
    context = command.make_context(name, list(rest), resilient_parsing=True)
    assert context.args == []
    known = {option for each in command.params for option in each.opts}
    assert {word for word in rest if word.startswith("--")} <= known


def test_the_apply_job_makes_the_streams_and_ends_with_success_when_run_again(account: Account, tmp_path: Path) -> None:
    where = {"AIQUEUE_URL": account.url, "AIQUEUE_USER": account.user, "AIQUEUE_PASSWORD": account.password}

    def run(*words: str) -> int:
        command = [sys.executable, "-m", "aiqueue", *words]
        ran = subprocess.run(command, cwd=tmp_path, env={**os.environ, **where}, check=False, timeout=60)
        return ran.returncode

    arguments = container_of(load("apply.yaml"))["args"]
    assert run("plan") == 3
    assert [run(*arguments), run(*arguments), run("plan")] == [0, 0, 0]

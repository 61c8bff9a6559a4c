"""The command line: clear errors with exit code 2, never a traceback; and the files that go with it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from typer.testing import CliRunner

from scripts.cli import app

ROOT = Path(__file__).resolve().parents[2]


def refused(*args: str | Path) -> str:
    """Runs a command that must end with exit code 2, and returns what it said."""
    done = CliRunner().invoke(app, [str(a) for a in args], env={"COLUMNS": "200"})
    assert done.exit_code == 2, (done.exit_code, done.output, done.exception)
    assert "Traceback" not in done.output
    return done.output


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


def test_serve_refuses_a_missing_model_folder(tmp_path: Path) -> None:
    assert "does not exist" in refused("serve", "--model", tmp_path / "none")
    assert "config.json is missing" in refused("serve", "--model", tmp_path)


def test_serve_refuses_a_port_in_use(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = refused("serve", "--model", model, "--port", str(taken.getsockname()[1]))
    assert "in use" in said
    assert "--port" in said


def test_serve_refuses_a_bad_policy_by_line(model: Path, tmp_path: Path) -> None:
    policy = tmp_path / "p.yaml"
    policy.write_text("itl_ms: 5\nttft: 500\n")
    assert f"{policy}:2: unknown key `ttft`; did you mean `ttft_ms`?" in refused(
        "serve", "--model", model, "--policy", policy
    )


def test_serve_refuses_a_bad_config_by_line(tmp_path: Path) -> None:
    config = tmp_path / "s.yaml"
    config.write_text("port: 1\nnum_decoders: 5\n")
    assert f"{config}:2: unknown key `num_decoders`" in refused("serve", "--config", config)
    assert "no such file" in refused("serve", "--config", tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "args", [["serve", "--port", "99999"], ["serve", "--num-decode", "0"], ["serve", "--dtype", "int4"], ["sevre"]]
)
def test_bad_options(args: Sequence[str]) -> None:
    assert refused(*args)


def test_calibrate_refuses_what_is_not_there(model: Path, tmp_path: Path) -> None:
    none = tmp_path / "none"
    assert "does not exist" in refused("calibrate", "--model", none, "--text", none, "--out", tmp_path)
    assert "--text" in refused("calibrate", "--model", model, "--text", none, "--out", tmp_path)
    assert "heldout.txt" in refused("calibrate", "--model", model, "--out", tmp_path / "profile")
    (model / "heldout.txt").write_text("x")
    nowhere = model / "heldout.txt" / "profile"
    assert "cannot be written" in refused("calibrate", "--model", model, "--out", nowhere)


def test_bench_says_what_is_wrong() -> None:
    assert "no server answers" in refused("bench", "--base-url", "http://127.0.0.1:9", "--goodput", "ttft:5", "tpot:5")
    assert "--extra-body" in refused("bench", "--extra-body", "{")
    assert "unexpected argument" in refused("bench", "tpot:100")


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, scripts.cli; print({'torch', 'ray', 'fastapi', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("args", "key"), [(["schema"], "ttft_ms"), (["schema", "policy"], "ttft_ms"), (["schema", "serve"], "num_decode")]
)
def test_schema_prints_json(args: Sequence[str], key: str) -> None:
    done = CliRunner().invoke(app, list(args))
    assert done.exit_code == 0
    assert key in json.loads(done.output)["properties"]
    assert "'policy', 'serve'" in refused("schema", "polcy")


def test_schema_does_not_wait_for_torch() -> None:
    code = (
        "import sys, scripts.cli as c; c.schema(c.SchemaOf.SERVE); sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)


def test_version() -> None:
    done = CliRunner().invoke(app, ["version"])
    assert done.exit_code == 0
    assert done.output.strip()


@pytest.mark.parametrize("script", ["scripts/setup.sh", "scripts/test", "scripts/demo", ".ci/run"])
def test_shell_scripts_are_well_formed_and_executable(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    assert os.access(ROOT / script, os.X_OK)


def test_setup_says_which_python_it_needs(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/setup.sh", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    done = subprocess.run(
        ["bash", "scripts/setup.sh"],
        cwd=tmp_path,
        env={**os.environ, "KVSTREAM_PYTHON": "/bin/false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "Python 3.11 or newer" in done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("ray-cluster-*.yaml")), ids=lambda p: p.name)
def test_the_cluster_examples_pass_rays_own_checks(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    validate_config(prepare_config(config))
    if config["provider"]["type"] == "local":
        joined = "\n".join(config["worker_start_ray_commands"])
        assert '{"prefill": 1}' in joined
        assert '{"decode": 1}' in joined
    else:
        resources = [kind["resources"] for kind in config["available_node_types"].values()]
        assert {"prefill", "decode"} <= set().union(*resources)


def test_there_is_a_local_and_a_cloud_example() -> None:
    found = {path.name for path in (ROOT / "examples").glob("ray-cluster-*.yaml")}
    assert found >= {"ray-cluster-local.yaml", "ray-cluster-aws.yaml"}

"""Dockerfile and compose file without an engine: hadolint, the rules of this house, and that each rule would be seen broken."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from cmt_fast import cli
from cmt_fast.config import loading
from tests.fixtures.commands import ROOT, cmt

DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text("utf-8")
COMPOSE = (DOCKER / "compose.yaml").read_text("utf-8")


found = importlib.util.spec_from_file_location("rehearse", DOCKER / "rehearse.py")
rehearse = importlib.util.module_from_spec(found)
found.loader.exec_module(rehearse)
stages = rehearse.stages


def broken_rules(text: str) -> list[str]:
    """What a Dockerfile of this house must not be; an empty list when nothing is wrong."""
    wrong, parts = [], stages(text)
    names = [name for _, name, _ in parts]
    if names != ["cpu", "build", "gpu"]:
        wrong.append("stages")
    bases = dict(re.findall(r"^ARG (\w+_BASE)=(\S+)$", text, flags=re.M))
    wrong += ["tag"] * any(":" not in b or b.endswith(":latest") for b in bases.values())
    wrong += ["base"] * any(re.sub(r"[${}]", "", base) not in bases for base, _, _ in parts)
    for base, name, body in parts:
        last = {word: rest for word, rest in body}
        words = [word for word, _ in body]
        runs = " && ".join(rest for word, rest in body if word == "RUN")
        wrong += ["ADD"] * ("ADD" in words) + ["fetches"] * bool(re.search(r"\b(curl|wget|git clone)\b", runs))
        wrong += ["secret"] * any(re.search(r"(TOKEN|PASSWORD|SECRET|API_KEY)", rest) for _, rest in body)
        for command in re.findall(r"pip install[^&]*", runs):
            if "GPU_BASE" in base and re.search(r"\s(torch|torchvision|flash-attn|apex|triton)(\b|==)", command):
                wrong.append("torch")
            if not re.search(r"--no-deps|--constraint /etc/pip/constraint.txt", command):
                wrong.append("dependencies")
        for word, rest in body:
            if word == "COPY" and "--from=" not in rest:
                wrong += [f"missing {s}" for s in rest.split()[:-1] if not (ROOT / s).exists()]
        if name != "build":
            wrong += ["user"] * (not last.get("USER", "").isdigit() or last["USER"] == "0")
            after = words[len(words) - words[::-1].index("USER") :] if "USER" in words else []
            wrong += ["user not last"] * ("RUN" in after)
            wrong += ["unbuffered"] * ("PYTHONUNBUFFERED=1" not in " ".join(r for w, r in body if w == "ENV"))
            wrong += ["entrypoint"] * (not last.get("ENTRYPOINT", "").startswith('["/usr/bin/tini"'))
            wrong += ["signal"] * (last.get("STOPSIGNAL") != "SIGTERM")
            health = re.search(r"CMD (\[.*\])", last.get("HEALTHCHECK", ""))
            wrong += ["health"] * (not health or cmt(" ".join(json.loads(health[1]))) is None)
    return wrong


def test_the_dockerfile_keeps_the_rules():
    assert broken_rules(DOCKERFILE) == []


MUTATIONS = {
    "user": ("USER 10001", "USER cmt"),
    "user not last": ("USER 10001\n", "USER 10001\nRUN true\n"),
    "unbuffered": ("PYTHONUNBUFFERED=1", "PYTHONUNBUFFERED=0"),
    "tag": ("python:3.12-slim", "python:latest"),
    "base": ("FROM ${GPU_BASE} AS gpu", "FROM ubuntu:24.04 AS gpu"),
    "stages": ("AS build", "AS other"),
    "ADD": ("COPY csrc csrc", "ADD csrc csrc"),
    "fetches": ("RUN CMT_CUDA=1", "RUN curl -O x && CMT_CUDA=1"),
    "torch": ("pip install --no-deps /wheels", "pip install --no-deps torch /wheels"),
    "dependencies": ("pip install --no-deps /wheels", "pip install /wheels"),
    "missing nothing": ("COPY csrc csrc", "COPY nothing csrc"),
    "entrypoint": ('["/usr/bin/tini", "--"]', '["cmt"]'),
    "signal": ("STOPSIGNAL SIGTERM", "STOPSIGNAL SIGKILL"),
    "health": ("HEALTHCHECK --interval", "LABEL x="),
    "secret": ("ENV HOME=/home/cmt", "ENV HF_TOKEN=x HOME=/home/cmt"),
}


@pytest.mark.parametrize("rule", MUTATIONS)
def test_a_broken_rule_is_seen(rule):
    before, after = MUTATIONS[rule]
    assert before in DOCKERFILE and rule in broken_rules(DOCKERFILE.replace(before, after))


def test_hadolint_has_nothing_to_say():
    program = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run(
        [program, "-f", "json", str(DOCKER / "Dockerfile")], capture_output=True, text=True, timeout=60
    )
    assert json.loads(done.stdout) == [] and done.returncode == 0
    bad = subprocess.run(
        [program, "-f", "json", "-"], input="FROM a\nRUN cd /x\n", capture_output=True, text=True, timeout=60
    )
    assert {"DL3006", "DL3003"} <= {row["code"] for row in json.loads(bad.stdout)}


def test_the_context_has_all_that_is_copied_and_no_more():
    lines = [x for x in (ROOT / ".dockerignore").read_text().splitlines() if x and not x.startswith("#")]
    assert lines[0] == "*"
    kept = {x[1:] for x in lines if x.startswith("!")}
    copied = {
        s
        for _, _, body in stages(DOCKERFILE)
        for w, r in body
        if w == "COPY" and "--from" not in r
        for s in r.split()[:-1]
    }
    assert kept == copied


# ------------------------------------------------------------------------------------------------ the rehearsal


def test_every_command_of_the_images_is_rehearsed_or_says_why_not():
    """Of a new line of the Dockerfile somebody says here whether a machine without an engine runs it."""
    planned = {
        name: [step.command for word, rest in body if word == "RUN" for step in rehearse.steps(rest) if not step.why]
        for _, name, body in stages(DOCKERFILE)
    }
    validate = "cmt recipes validate --all"
    assert planned["cpu"] == [
        "install -d -o 10001 -g 10001 /runs",
        "pip install --no-deps --no-build-isolation .",
        validate,
    ]
    assert [c.split()[0] for c in planned["build"]] == ["CMT_CUDA=1", "python"]
    check = "python /opt/cmt-fast/check_gpu.py before /tmp/torch-before"
    assert planned["gpu"][1:] == [check, "pip install --no-deps /wheels/*.whl", validate]


SMALL = """ARG CPU_BASE=python:3.12-slim
FROM ${CPU_BASE} AS cpu
ARG WORD=none
ENV KEPT="/opt/cmt-fast/x y"
WORKDIR /opt/cmt-fast
COPY LICENSE docker ./
COPY docker/check_gpu.py /opt/cmt-fast/sub/
RUN apt-get update \\
    && test "$WORD" = given && test "$PWD/x y" = "$KEPT" && test "$CXX" = no-compiler-in-this-image && cp LICENSE /tmp/copied
RUN FAIL
CMD ["test", "-f", "/opt/cmt-fast/sub/check_gpu.py"]
"""


def test_a_rehearsal_follows_the_file_and_sees_what_fails(tmp_path, capsys):
    for command, failed in (("true", 0), ("echo why; false", 1)):
        work = rehearse.Rehearsal(tmp_path / str(failed), {"WORD": "given"}, network=False)
        (stage,) = stages(SMALL.replace("FAIL", command))
        work.stage(stage)
        said = capsys.readouterr().out
        assert work.failed == failed and ("why" in said.splitlines()) is bool(failed), said
        assert said.count("  done  ") == 8 - failed and "apt-get update  (needs a network and root)" in said
        assert (tmp_path / str(failed) / "tmp" / "copied").exists()
    with pytest.raises(SystemExit):
        rehearse.main(["gpus"])
    assert "'gpus' is no stage; the stages are cpu, build, gpu" in capsys.readouterr().err


def test_the_path_is_the_page_made_small_by_its_own_table(tmp_path):
    """What `python docker/rehearse.py run` runs: every full command, none of it left at full size."""
    path = rehearse.path_module()
    page = path.PAGE.read_text("utf-8")
    found = path.commands(page)
    full = [line for section in ("Data", "Train", "Evaluate", "Use") for line in path._lines(page, section)]
    assert [c.text.split()[0] for c in found if c.why] == ["sbatch", "torchrun"] and len(found) == len(full) + 6
    for text in [c.text for c in found if not c.why]:
        assert not re.search(r"imagenet|50000|data/|node 8|\b512\b", text), text
        arguments = cmt(text)
        if arguments:
            args, rest = cli.parser(arguments[0]).parse_known_args(arguments)
            assert all("=" in r for r in rest)
            if getattr(args, "recipe", None):
                loading.load(str(ROOT / args.recipe), [*getattr(args, "overrides", []), *rest])
    for row in path.scaled(page):
        less = page.replace(f"| `{row[0]}` |", "| `no such thing` |")
        assert less != page and path.commands(less) != found, f"{row[0]} is in no command"


def test_a_promise_that_is_not_kept_is_counted(tmp_path, capsys):
    path = rehearse.path_module()
    work = path.Rehearsal(tmp_path)
    work.promise("stages", work.stages)
    (tmp_path / "img512-two-step").mkdir()
    (tmp_path / "img512-two-step" / "README.md").write_text("license: mit")
    work.promise("card", work.card)
    work.step("false", ["false"])
    assert work.failed == 3 and capsys.readouterr().out.count("FAILED") == 3


# ------------------------------------------------------------------------------------------------ what is installed


def project() -> dict:
    return pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def test_the_gpu_image_installs_what_the_package_needs_and_no_torch():
    lines = [x for x in (DOCKER / "requirements-gpu.txt").read_text().splitlines() if x and not x.startswith("#")]
    mine, optional = {name(x) for x in lines}, project()["optional-dependencies"]
    in_base = {"torch", "numpy", "tensorboard", "nvidia-dali-cuda130"}
    wanted = {name(r) for extra in ("demo", "zero", "eval", "latents", "dali") for r in optional.get(extra, [])}
    assert {name(r) for r in project()["dependencies"]} | wanted <= mine | in_base
    assert not mine & {"torch", "torchvision", "flash-attn", "apex", "triton"}


def test_another_torch_would_stop_the_build(tmp_path):
    check = [sys.executable, str(DOCKER / "check_gpu.py")]
    subprocess.run([*check, "before", str(tmp_path / "torch")], check=True, timeout=60)
    done = subprocess.run([*check, "after", str(tmp_path / "torch")], capture_output=True, text=True, timeout=60)
    assert "the image has no" in done.stderr and "flash_attn" in done.stderr or done.returncode == 0
    (tmp_path / "torch").write_text("2.11.0a0+nv /usr/lib/torch/__init__.py")
    done = subprocess.run([*check, "after", str(tmp_path / "torch")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "torch was 2.11.0a0+nv" in done.stderr


# ------------------------------------------------------------------------------------------------ compose

# of the Compose Specification, what a service here may use, and the type that it wants
SERVICE = {
    "image": str, "build": dict, "user": str, "read_only": bool, "tmpfs": list, "security_opt": list, "cap_drop": list,
    "volumes": list, "stop_grace_period": str, "shm_size": str, "ulimits": dict, "deploy": dict, "healthcheck": dict,
    "command": list, "restart": str, "profiles": list, "environment": dict,
}  # fmt: skip
HEALTH = {"test", "interval", "timeout", "start_period", "retries", "disable"}


def default(text: str) -> str:
    """A value with the defaults of its variables."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def services() -> dict[str, dict]:
    return yaml.safe_load(COMPOSE)["services"]


@pytest.mark.parametrize("service", services())
def test_a_service_is_what_the_specification_knows(service):
    tree = yaml.safe_load(COMPOSE)
    assert set(tree) <= {"name", "services", "x-common", "x-gpu"}
    s = services()[service]
    assert set(s) <= set(SERVICE), sorted(set(s) - set(SERVICE))
    assert all(isinstance(v, SERVICE[k]) for k, v in s.items())
    assert set(s["healthcheck"]) <= HEALTH
    assert s["build"] == {"context": "..", "dockerfile": "docker/Dockerfile", "target": s["image"].partition(":")[2]}
    assert s["build"]["target"] in [n for _, n, _ in stages(DOCKERFILE)]
    for value in (
        s["stop_grace_period"],
        *(s["healthcheck"].get(k, "1s") for k in ("interval", "timeout", "start_period")),
    ):
        assert re.fullmatch(r"\d+[smh]", value)


@pytest.mark.parametrize("service", services())
def test_a_service_is_kept_in_bounds_and_told_to_stop(service):
    s = services()[service]
    assert s["read_only"] is True and s["cap_drop"] == ["ALL"] and "no-new-privileges:true" in s["security_opt"]
    assert re.fullmatch(r"\d+:\d+", default(s["user"])) and not default(s["user"]).startswith("0:")
    mounts = [default(v).split(":") for v in s["volumes"]]
    data = (
        ["/data"] if service == "cmt" else ["/data", "ro"]
    )  # `cmt data` and downloads write there, training never does
    assert [m[1:] for m in mounts] == [data, ["/runs"]]
    assert any(t.startswith("/tmp:exec") for t in s["tmpfs"]) and s["stop_grace_period"] == "120s"
    if s["image"] == "cmt-fast:gpu":
        device = s["deploy"]["resources"]["reservations"]["devices"][0]
        assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
        assert s["shm_size"] == "16gb" and s["ulimits"] == {"memlock": -1, "stack": 67108864}


@pytest.mark.parametrize("service", services())
def test_the_commands_of_a_service_parse(service):
    s = services()[service]
    lines = [s["command"]] + ([] if s["healthcheck"].get("disable") else [s["healthcheck"]["test"][1:]])
    for words in lines:
        arguments = cmt(" ".join(map(default, words)))
        assert arguments, words
        args, rest = cli.parser(arguments[0]).parse_known_args(arguments)
        assert not rest
        recipe = getattr(args, "recipe", None)
        if recipe:
            loading.load(recipe)
    if not s["healthcheck"].get("disable"):
        out = default(" ".join(s["command"])).split("--out ")[1].split()[0]
        assert out in default(" ".join(s["healthcheck"]["test"])), "the health check looks at the run that is trained"


# ------------------------------------------------------------------------------------------------ SLURM

SBATCH = DOCKER / "slurm" / "train.sbatch"
SRUN = """#!/bin/bash
echo "$@" > step; env | grep -E '^(NCCL|TORCH|OMP)_' > environment
trap 'echo saved; sleep 0.2; exit 143' TERM
touch ready
{}
"""


def submitted(
    folder: Path, step: str, signal: str = "", gpus: str = "h100:8", **more: str
) -> tuple[int, str, list[str]]:
    """The batch script as SLURM runs it, `step` in the place of the ranks: exit code, what was printed, calls of scontrol."""
    commands = folder / "bin"
    commands.mkdir()
    (commands / "srun").write_text(SRUN.format(step))
    (commands / "scontrol").write_text('#!/bin/bash\necho "$@" >> scontrol.log; printf "one\\ntwo\\n"\n')
    for path in commands.iterdir():
        path.chmod(0o755)
    environment = {
        "PATH": f"{commands}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_RESTART_COUNT": "3",
        "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_PER_NODE": gpus, "OMP_NUM_THREADS": "5", **more,
    }  # fmt: skip
    command = ["bash", str(SBATCH), "digits", "--out", "run", "engine=zero"]
    job = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    while signal and not (folder / "ready").exists():
        time.sleep(0.01)
    if signal:
        subprocess.run(["kill", f"-{signal}", str(job.pid)], check=True)
    said = job.communicate(timeout=30)[0]
    return job.returncode, said, (folder / "scontrol.log").read_text().splitlines()


def test_a_job_whose_time_is_up_saves_and_is_queued_again(tmp_path):
    code, said, asked = submitted(tmp_path, "while true; do sleep 0.05; done", "USR1")
    assert (code, asked) == (0, ["show hostnames n[1-2]", "requeue 7"]) and said.startswith("saved")


def test_a_job_is_not_queued_again_for_ever(tmp_path):
    code, _, asked = submitted(tmp_path, "while true; do sleep 0.05; done", "USR1", MAX_REQUEUES="3")
    assert (code, asked) == (143, ["show hostnames n[1-2]"])


@pytest.mark.parametrize("code", [0, 9])
def test_a_job_that_ends_by_itself_is_not_queued_again(tmp_path, code):
    assert submitted(tmp_path, f"exit {code}")[::2] == (code, ["show hostnames n[1-2]"])


def test_a_job_that_finishes_while_it_is_stopped_is_not_queued_again(tmp_path):
    code, _, asked = submitted(tmp_path, "trap '' TERM; touch ready; sleep 0.3; exit 0", "USR1")
    assert (code, asked) == (0, ["show hostnames n[1-2]"])


def test_a_step_is_what_torchrun_and_we_understand(tmp_path):
    from torch.distributed.run import get_args_parser

    submitted(tmp_path, "exit 0")
    words = (tmp_path / "step").read_text().split()
    found = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
    assert (found.nnodes, found.nproc_per_node, found.rdzv_endpoint, found.rdzv_id) == ("2", "8", "one:29500", "7-3")
    assert cmt(" ".join(words)) == ["train", "digits", "--out", "run", "engine=zero"]
    environment = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines())
    assert environment["OMP_NUM_THREADS"] == "5" and environment["NCCL_DEBUG"] == "WARN", "the operator's, else ours"
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1", (
        "without it a restart on several nodes never connects"
    )
    signalled = int(re.search(r"^#SBATCH --signal=B:USR1@(\d+)$", SBATCH.read_text(), flags=re.M)[1])
    assert 30 < int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < signalled

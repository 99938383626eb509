"""Every command in README.md, as it stands there, made small by what is added behind it."""

import re
import shlex
import subprocess

import pytest

import helpers

BLOCK = re.compile(r"```bash\n(.*?)```", re.S)
SMALL = ["--gin.TRAIN_STEPS=3", "--gin.WARMUP_STEPS=1", "--gin.BATCH_SIZE=4",
         "--gin.train.profile_start=1", "--gin.train.eval_examples=8"]


def commands() -> list[list[str]]:
    """The commands of README's bash blocks, split as a shell splits them."""
    text = (helpers.ROOT / "README.md").read_text().replace("\\\n", " ")
    lines = [line for block in BLOCK.findall(text) for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def of(program: str) -> list[list[str]]:
    return [words for words in commands() if words[0] == program]


def test_nothing_in_the_readme_is_unknown():
    assert {words[0] for words in commands()} == {"vishwam", "bash"}
    assert len(of("vishwam")) >= 4
    for words in of("bash"):
        assert (helpers.ROOT / words[1]).exists(), words


@pytest.mark.parametrize("words", of("vishwam"), ids=" ".join)
def test_vishwam_commands(words, tmp_path, quickstart_cache):
    more = []
    if words[1] == "train":
        more = [*SMALL, f'--gin.MODEL_DIR="{tmp_path}/run"']
        if any("profile_steps" in word for word in words):
            more = [*more, "--gin.TRAIN_STEPS=8"]
    # From another folder: the gin files are found all the same, and nothing is left behind here.
    done = helpers.run(["-m", "vishwam_t5x", *words[1:], *more], env=quickstart_cache,
                       cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    if "profile_steps" in " ".join(words):
        assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    "words", [words for words in of("bash") if words[1] == "tests/run.sh" and len(words) > 2],
    ids=" ".join)
def test_test_commands_select_something(words):
    pytest_arguments = words[2:]
    done = helpers.run(["-m", "pytest", "-q", "--collect-only", *pytest_arguments])
    assert done.returncode == 0, done.stdout[-2000:]
    assert re.search(r"^[1-9]\d*(/\d+)? tests? collected", done.stdout, re.M), done.stdout[-500:]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_two_commands_in_a_fresh_clone(tmp_path):
    """As a new user: a clone, no environment; the second time nothing is installed."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(helpers.ROOT), str(clone)], check=True)
    env = {**helpers.environment(env={"PYTHONPATH": None}),
           "VISHWAM_CACHE_DIR": str(tmp_path / "cache")}
    for attempt in range(2):
        done = subprocess.run(["bash", "launch/quickstart.sh"], cwd=clone, env=env, check=False,
                              capture_output=True, text=True, timeout=2400)
        assert done.returncode == 0, done.stderr[-4000:]
        assert ("preparing" in done.stdout + done.stderr) == (attempt == 0)
        assert "exact_match" in done.stdout
    assert (clone / "runs" / "quickstart" / "what_it_learned.png").stat().st_size > 10_000

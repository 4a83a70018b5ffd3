"""The ports in examples/ports climb the whole ladder, and bugs planted in the C port are found."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from crosscheck.kit import STAGES, kit_cases
from crosscheck.port import Climb, climb
from microgpt.settings import FIXTURES

PORTS = FIXTURES.parent / "examples" / "ports"
CARGO = Path.home() / ".cargo" / "bin"
TORCH_CASES = ["microgpt-243", "tied-two-layers", "decay-and-clip"]  # a second or two for each

# what is put in the place of what, the stage that finds it, the first tensor, the diagnosis
BUGS = {
    "embeds the position after": (
        ("wpe[t * C + i]; /*", "wpe[(t + 1) % c.block_size * C + i]; /*"),
        ("embedding", "forward/emb", "wpe is one position ahead"),
    ),
    "adds epsilon to the root": (
        ("real scale = 1 / sqrt(ms + eps);\n    for (int i = 0; i < n; i++) y",
         "real scale = 1 / (sqrt(ms) + eps);\n    for (int i = 0; i < n; i++) y"),
        ("norm", "forward/emb_norm", "added to the root"),
    ),
    "does not scale the attention": (
        ("attn_logits[u] = score / sqrt(D)", "attn_logits[u] = score"),
        ("attention", "forward/layer0.attn_logits", "sqrt(D)"),
    ),
    "has no residual behind the MLP": (
        ("for (int i = 0; i < C; i++) mlp_res[i] += x[i];", ""),
        ("MLP", "forward/layer0.mlp_res", "residual"),
    ),
    "takes the first layer for all": (
        ("r * C, p.layers[i], r, c,", "r * C, p.layers[0], r, c,"),
        ("layers", "forward/layer1.mlp_pre", ""),
    ),
    "counts padding": (
        ("tap.loss_t[r] / n / B", "tap.loss_t[r] / T / B"),
        ("loss", "forward/loss", "padding is counted"),
    ),
    "leaves the norm's mean out of its derivative": (
        ("scale * (dy[i] - y[i] * mean)", "scale * dy[i]"),
        ("backward", "backward/dlayer0.attn_res", "second term of the norm's derivative"),
    ),
    "lets the last query alone pull at a value": (
        ("dv[d] += dattn_out[d]", "dv[d] = dattn_out[d]"),
        ("backward", "backward/dlayer0.v", ""),
    ),
    "counts a repeated token once": (
        ("dp.wte[token * C + i] += demb[i]", "dp.wte[token * C + i] = demb[i]"),
        ("gradients", "gradient/dwte", ""),
    ),
    "adds Adam's epsilon under the root": (
        ("(sqrt(v_hat) + c.adam_eps)", "sqrt(v_hat + c.adam_eps)"),
        ("Adam", "update/wte", "under the root"),
    ),
    "does not clip": (
        ("longest > 0 && sqrt(squares) > longest ?", "0 ?"),
        ("Adam", "adam_m/", "not clipped"),
    ),
    "forgets m from step to step": (
        ("double grad = factor", "if (step > 1) m.data[i] = 0;\n            double grad = factor"),
        ("Adam", "adam_m/", "does not remember"),
    ),
    "begins every step with the first parameters": (
        ('find_tensor(out, "step%d/%s/%s", step - 1, name, own)',
         'find_tensor(in, "step%d/%s/%s", first, entry, own)'),
        ("several steps", "forward/emb", ""),
    ),
}  # fmt: skip


def find(name: str) -> str:
    """Where a program is; skips the test if it is not here."""
    found = shutil.which(name) or shutil.which(name, path=str(CARGO))
    if not found:
        pytest.skip(f"{name} is not installed")
    return found


def compiled(source: Path, to: Path, *flags: str) -> str:
    """A C program, or one in Rust."""
    if source.suffix == ".rs":
        command = [find("rustc"), "--edition", "2021", "-O", "-D", "warnings", "-o", to, source]
    else:
        command = [find("gcc"), "-std=c99", "-O1", *flags, "-o", to, source, "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return str(to)


def run(*words: str, cases: list[str] | None = None, dtype: str = "float64") -> Climb:
    names = cases or kit_cases()
    return climb([*words, "{in}", "{out}"], names, STAGES, dtype, "vectorized", 60, False)


def complete(result: Climb) -> bool:
    assert result.exit_status == 0, str(result)
    return all(rung.agreed == rung.expected > 0 for rung in result.rungs)


def test_the_port_in_c_is_right(tmp_path: Path) -> None:
    strict = ("-Wall", "-Wextra", "-Werror")
    assert complete(run(compiled(PORTS / "microgpt.c", tmp_path / "port", *strict)))


def test_the_port_in_c_is_right_in_single_precision(tmp_path: Path) -> None:
    program = compiled(PORTS / "microgpt.c", tmp_path / "port", "-DREAL=float")
    assert complete(run(program, dtype="float32"))


def test_the_port_in_javascript_is_right() -> None:
    assert complete(run(find("node"), str(PORTS / "microgpt.mjs")))


def test_the_port_in_rust_is_right(tmp_path: Path) -> None:
    assert complete(run(compiled(PORTS / "microgpt.rs", tmp_path / "port")))


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
def test_the_port_in_pytorch_is_right() -> None:
    assert complete(run(sys.executable, str(PORTS / "torch_port.py"), cases=TORCH_CASES))


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_planted_in_the_port_in_c_is_found_where_it_is(bug: str, tmp_path: Path) -> None:
    (old, new), (stage, key, diagnosis) = BUGS[bug]
    text = (PORTS / "microgpt.c").read_text(encoding="utf-8")
    assert text.count(old) == 1
    (tmp_path / "bug.c").write_text(text.replace(old, new), encoding="utf-8")
    cases = ["four-layers", "microgpt-243", "decay-and-clip", "repeated-token"]
    result = run(compiled(tmp_path / "bug.c", tmp_path / "bug"), cases=cases)
    assert result.exit_status == 1
    wrong = [rung for rung in result.rungs if rung.wrong]
    found = wrong[0].wrong[next(iter(wrong[0].wrong))]
    assert wrong[0].stage == stage, str(result)
    assert found.key.replace("layer3", "layer0").startswith(key)
    assert found.at_fault == "candidate"
    assert diagnosis in found.diagnosis


def test_the_ports_have_the_functions_of_the_texts_in_their_order() -> None:
    functions = ["linear", "softmax", "rmsnorm", "activation", "attention", "mlp", "gpt"]
    functions += ["cross_entropy", "loss"]
    forms = {
        "microgpt.c": [f" {name}_{way}(" for name in functions for way in ("forward", "backward")],
        "microgpt.rs": [
            f"fn {name}_{way}(" for name in functions for way in ("forward", "backward")
        ],
        "microgpt.mjs": [
            f"function {name}{way}("
            for name in [*functions[:7], "crossEntropy", "loss"]
            for way in ("Forward", "Backward")
        ],
    }
    for file, wanted in forms.items():
        text = (PORTS / file).read_text(encoding="utf-8")
        places = [text.find(one) for one in wanted]
        assert min(places) > 0, file
        assert places == sorted(places), file


@pytest.mark.parametrize("file", sorted(PORTS.glob("*.*")), ids=lambda path: path.name)
def test_the_examples_are_ascii_of_100_columns(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 100


def test_the_workflow_can_be_read_and_runs_the_port() -> None:
    workflow = yaml.safe_load((PORTS / "crosschecked.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["crosschecked"]["steps"]
    assert any("crosscheck port --program" in step.get("run", "") for step in steps)

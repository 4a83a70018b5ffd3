"""The pages: what they show, and that every text from outside is escaped."""

from __future__ import annotations

import base64
import json
import re
import shlex
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import pytest
from faults import microgpt

pytest.importorskip("jinja2", reason="pages need the extra `pages`")
pytest.importorskip("pygments", reason="pages need the extra `pages`")

from crosscheck import html
from crosscheck.__main__ import main as crosscheck
from crosscheck.atlas import LARGEST as LARGEST_ATLAS
from crosscheck.atlas import atlas
from crosscheck.cases import Case, case_names, draw_params, load_case, with_params
from crosscheck.compare import Outcome, compare
from crosscheck.document import Document
from crosscheck.stops import Stop, Stops
from crosscheck.trace import Step, trace
from microgpt.backend import fresh_state, load_backend
from microgpt.errors import MicrogptError
from microgpt.pages import pictures, run_report
from microgpt.pages.sources import Source, side_by_side, upside_down
from microgpt.settings import load_config
from microgpt.taps import consumers, taps

LARGEST_MAP = 1_000_000
SCALAR, VECTORIZED = Source("scalar/model.py"), Source("vectorized/model.py")
SHORT = {name.rpartition(".")[2] for name in taps(load_config())}
FUNCTIONS = [name for name in SCALAR.functions if f"{name}_forward" in VECTORIZED.functions]


class Elements(HTMLParser):
    """The elements of a page, and its texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def ids(self) -> list[str]:
        return [str(attrs["id"]) for _, attrs in self.tags if "id" in attrs]

    def addresses(self) -> list[str]:
        return [
            str(attrs[name]) for _, attrs in self.tags for name in ("href", "src") if name in attrs
        ]


def pixels(address: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The levels of a picture, and the opacity of each level."""
    data = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + size]
        assert int.from_bytes(data[at + 8 + size : at + 12 + size], "big") == zlib.crc32(
            kind + body
        )
        chunks[kind] = body
        at += 12 + size
    width, height = (int.from_bytes(chunks[b"IHDR"][i : i + 4], "big") for i in (0, 4))
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    return rows[:, 1:], np.frombuffer(chunks[b"tRNS"], np.uint8)


# --- pictures ------------------------------------------------------------------------------------


def test_a_heat_map_has_a_pixel_a_number_blank_at_zero_and_full_at_the_scale() -> None:
    there = np.array([[True, True, True], [True, True, False]])
    levels, opacity = pixels(
        pictures.heat(np.array([[0.0, 2.0, -2.0], [1.0, np.nan, 5.0]]), 2.0, there)
    )
    assert opacity[levels[0]].tolist() == [0, 255, 255]
    assert levels[0, 1] > levels[0, 0] > levels[0, 2]
    assert 100 < opacity[levels[1, 0]] < 160
    assert (levels[1, 1:] == pictures.ABSENT).all()


def test_a_large_matrix_keeps_its_largest_numbers() -> None:
    matrix = np.zeros((1000, 2))
    matrix[777, 1] = -3.0
    levels, _ = pixels(pictures.heat(matrix, 3.0))
    assert levels.shape == (pictures.LARGEST, 2)
    assert levels.min() == 0
    there = np.arange(1000)[:, None] < [1000, 0]
    levels, _ = pixels(pictures.heat(matrix, 3.0, there))
    assert (levels[:, 1] == pictures.ABSENT).all()
    assert (levels[:, 0] == pictures.LEVELS).all()


def test_a_curve_of_many_steps_keeps_its_means_and_its_ends() -> None:
    x = np.arange(1.0, 100_001)
    line = pictures.Line("loss", x, np.where(x <= 50_000, 4.0, 2.0))
    drawn = pictures.chart("Loss", [line], level=3.0)
    assert drawn is not None
    points = re.findall(r"([\d.]+) ([\d.]+)", drawn.lines[0].path)
    assert len(points) == pictures.POINTS
    heights = [float(y) for _, y in points]
    assert heights[0] < 100
    assert heights[-1] > 900
    assert drawn.level == pytest.approx(50)


def test_a_character_that_would_not_be_seen_is_labelled_by_its_number() -> None:
    assert [pictures.label(char) for char in "a\n \u00e9"] == ["a", "U+000A", "U+0020", "\u00e9"]


def test_a_chart_without_points_is_none() -> None:
    nothing = np.array([])
    assert pictures.chart("Loss", [pictures.Line("loss", nothing, nothing)]) is None


# --- the two texts -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_side_by_side_is_every_line_once_in_order(name: str) -> None:
    for function, of in ((f"{name}_forward", side_by_side), (f"{name}_backward", upside_down)):
        rows = of(SCALAR, name, VECTORIZED, function, {})
        left = [line.number for row in rows for line in row.left]
        right = [line.number for row in rows for line in row.right]
        for found, source, one in ((left, SCALAR, name), (right, VECTORIZED, function)):
            node = source.functions[one]
            assert sorted(found) == list(range(node.lineno, (node.end_lineno or 0) + 1))
        assert right == sorted(right)
        assert left == sorted(left) or of is upside_down


def test_lines_that_keep_the_same_tap_stand_side_by_side() -> None:
    rows = side_by_side(SCALAR, "attention", VECTORIZED, "attention_forward", {})
    together = 0
    for row in rows:
        names = [
            set(re.findall(r"tap\.(\w+)\b(?=[^=]*=[^=])", " ".join(str(x.code) for x in lines)))
            & SHORT
            for lines in (row.left, row.right)
        ]
        assert not (names[0] and names[1]) or names[0] & names[1]
        together += bool(names[0] & names[1])
    assert together >= 6


@pytest.mark.parametrize("name", sorted(SHORT))
def test_every_tap_has_its_lines_in_both_texts(name: str) -> None:
    assert SCALAR.behind("tap", name, SHORT)
    for tree in ("tap", "dtap"):
        lines = VECTORIZED.behind(tree, name, SHORT)
        assert any(f"{tree}.{name}" in VECTORIZED.lines[n - 1].replace("_i.", ".") for n in lines)


def test_the_lines_behind_dk_are_its_product_and_nothing_of_dq() -> None:
    text = "\n".join(VECTORIZED.lines[n - 1] for n in VECTORIZED.behind("dtap", "k", SHORT))
    assert 'dk_heads = einsum("bhtu,bthd->buhd", dscores, q_heads)' in text
    assert "dscores = dattn_logits / config.head_dim**0.5" in text
    assert "dq_heads =" not in text
    assert "softmax_backward" not in text


# --- the atlas -----------------------------------------------------------------------------------


def atlas_of(case: Case, update: bool = False) -> str:
    return atlas(case, fresh_state(case.params), case.name, update)


def stops_of(case: Case, update: bool = False) -> Stops:
    return Stops(Document(case, fresh_state(case.params), update))


def stop_of(case: Case, name: str) -> Stop:
    return next(stop for stop in stops_of(case) if stop.id == name)


@pytest.mark.parametrize("name", ["three-layers", "microgpt-243", "one-position"])
def test_what_the_consumers_send_back_adds_up_to_the_derivative(name: str) -> None:
    case = load_case(name)
    made = stops_of(case)
    for stop in made:
        if stop.kind == "forward" or stop.id == "dloss":
            continue
        users = {user.name for user, _ in consumers(case.config)[stop.id[1:]]}
        assert {link.to for link in stop.before} == {f"d{user}" for user in users}
        found = made.document.additions.one[stop.element.place]
        assert {one.source.name for one in found} == users
        assert sum(one.product for one in found) == pytest.approx(stop.element.scalar)
        if len(users) > 1:
            key = f"{'backward' if stop.kind == 'backward' else 'gradient'}/{stop.id}"
            parts = made.document.additions.parts[stop.id[1:]]
            np.testing.assert_allclose(
                sum(parts.values()), made.vectorized[key], rtol=1e-9, atol=1e-12
            )
            assert {part.link.to for part in stop.parts} == {f"d{user}" for user in users}
            assert sum(part.value for part in stop.parts) == pytest.approx(stop.element.scalar)
            assert sum(part.count for part in stop.parts) == len(found)


@pytest.mark.parametrize("name", ["three-layers", "microgpt-243", "gelu"])
def test_the_gradient_beside_an_addition_is_that_of_the_tap_named(name: str) -> None:
    case = load_case(name)
    made, parts = stops_of(case), 0
    for stop in made:
        for term in stop.terms:
            add = term.addition
            if term.gradient is not None:
                key, at = f"backward/d{add.source.name}", add.source.at
                assert term.gradient == pytest.approx(made.vectorized[key][at])
                assert add.value_grad == pytest.approx(add.share * term.gradient)
                parts += add.share != 1
            else:
                assert ":" in term.source
    assert parts >= 8


def test_dk_is_traced_to_the_positions_that_look_at_it() -> None:
    case = load_case("one-document")
    stop, D = stop_of(case, "dlayer0.k"), case.config.head_dim
    assert stop.used_in == ["attn_logits = q[t] . k[u] / sqrt(D)"]
    assert [link.text for link in stop.after] == ["dattn_norm", "dattn_wk"]
    T = len(case.docs(0)[0]) - 1
    assert [term.source.partition(", ")[2] for term in stop.terms] == [
        f"t={t}, u=1]" for t in range(T - 1, 0, -1)
    ]
    assert all(re.fullmatch(r"q\[t=\d, c=\d+\]", term.factor) for term in stop.terms)
    assert all(" looks at " in term.looks for term in stop.terms)
    assert {term.addition.share for term in stop.terms} == {D**-0.5}
    assert stop.notes == [
        "k goes into the dot product q . k. That is divided by sqrt(4) = 2 to give attn_logits, so"
        " value.grad is dattn_logits / 2."
    ]


@pytest.mark.parametrize("name", ["three-layers", "microgpt-243", "one-document"])
def test_the_numbers_that_are_followed_follow_from_each_other(name: str) -> None:
    case = load_case(name)
    made = stops_of(case)
    chain, additions = made.document.chain, made.document.additions.one
    for operand, users in consumers(case.config).items():
        if users:
            first = chain[users[0][0].name]
            assert any(first in one.towards for one in additions[chain[operand]]), operand
    links = [link.text for link, _ in made.chain()]
    assert len(set(links)) == len(links) == 1 + len(taps(case.config))
    _, t, v = chain["logits"].at
    assert v == made.document.tokens[t + 1]
    assert 0 < t < len(made.document.tokens) - 2 or len(made.document.tokens) <= 3
    for mlp in [tap for tap in made.table if tap.endswith("mlp_res")]:
        layer, (_, t, o) = mlp.removesuffix("mlp_res"), chain[mlp].at
        act = made.scalar[f"forward/{layer}mlp_act"][0, t]
        shares = np.abs(made.scalar[f"entry/{layer}mlp_fc2"][o] * act)
        assert chain[f"{layer}mlp_act"].at[-1] == np.argmax(shares)
        assert shares.max() > 0  # a unit that relu lets through


def test_of_many_additions_the_largest_are_listed_and_the_others_summed() -> None:
    made = stops_of(load_case("one-document"))
    assert len(made.document.additions.one[made.document.chain["layer0.mlp_norm"]]) == 64
    for most in (16, 4):
        made.detail = made.detail._replace(additions=most)
        for stop in made:
            found = made.document.additions.one[stop.element.place]
            if stop.kind == "forward" or not found:
                continue
            largest = max(found, key=lambda one: abs(one.product))
            assert not largest.product or largest in [term.addition for term in stop.terms]
            listed = sum(term.addition.product for term in stop.terms)
            assert listed + stop.rest == pytest.approx(stop.element.scalar)
            assert len(stop.terms) + stop.left_out + stop.zeros == len(found)
            assert all(term.addition.product for term in stop.terms)
            assert len(stop.terms) <= most


def test_softmax_and_cross_entropy_are_taken_apart() -> None:
    made = stops_of(load_case("three-layers"))
    stops = {stop.id: stop for stop in made}
    for layer in range(3):
        stop = stops[f"dlayer{layer}.attn_logits"]
        _, _, t, u = stop.element.place.at
        assert len(stop.shares) == t + 1
        assert sum(share.product for share in stop.shares) == pytest.approx(stop.element.scalar)
        weights = made.scalar[f"forward/layer{layer}.attn_weights"][stop.element.place.at[:3]]
        for i, share in enumerate(stop.shares):
            assert share.factor == pytest.approx(weights[i] * ((i == u) - weights[u]))
            assert share.slope == f"w[u={i}] ({int(i == u)} - w[u={u}])"
    (note,) = stops["dlogits"].notes
    at = stops["dlogits"].element.place.at
    logits = made.scalar["forward/logits"][at[:2]]
    assert note.endswith(f" = {np.exp(logits[at[2]]) / np.exp(logits).sum():.4g} - 1.")


def test_an_id_has_its_token_and_each_axis_its_letter() -> None:
    made = stops_of(load_case("one-document"))
    written = {stop.id: stop.element.at for stop in made}
    assert re.fullmatch(r"dwte\[v=\d+ \(\w+\), c=\d+\]", written["dwte"])
    assert re.fullmatch(r"logits\[t=\d, v=\d+ \(\w+\)\]", written["logits"])
    assert re.fullmatch(r"mlp_pre\[t=\d, f=\d+\]", written["layer0.mlp_pre"])
    formula = next(stop for stop in made if stop.id == "emb").element.formula
    assert re.fullmatch(r"wte\[v=\d+ \(\w+\)\] \+ wpe\[t=\d\]", formula)


def test_the_rows_that_a_document_uses_stand_above_the_fold() -> None:
    made = stops_of(load_case("one-document"))
    tokens, stops = made.document.tokens, {stop.id: stop for stop in made}
    for name, used in (("dwte", len(set(tokens))), ("dwpe", len(tokens) - 1)):
        for numbers in [side.numbers for side in stops[name].sides]:
            assert len(numbers.rows) == used
            assert len(numbers.rows + numbers.folded) == len(made.scalar[f"gradient/{name}"])
            assert numbers.left_out == 0
        weights = stops[name].beside[0].numbers
        assert weights is not None
        assert len(weights.rows) == used
    left, right = (side.numbers.rows for side in stops["layer0.attn_weights"].sides)
    assert [row[:7] for row in left] == [row[:7] for row in right]


def test_only_lines_that_this_layer_and_this_model_run_are_listed() -> None:
    def lines(name: str, stop: str) -> str:
        made = next(one for one in stops_of(load_case(name)) if one.id == stop)
        return "\n".join(f"{line.code.striptags()}" for line in made.sides[1].lines)

    last, inner = (lines("three-layers", f"dlayer{i}.mlp_res") for i in (2, 1))
    assert "linear_backward(dlogits" in last
    assert "rmsnorm_backward" not in last
    assert "linear_backward(dlogits" not in inner
    assert "rmsnorm_backward(dattn_norm" in inner
    assert "if config.norm_embedding:" in lines("one-document", "demb_norm")
    assert "linear_backward(dlogits" not in lines("one-document", "dwte")
    assert "linear_backward(dlogits" in lines("microgpt-243", "dwte")


def test_each_name_of_a_picture_says_what_it_counts() -> None:
    made = stops_of(load_case("one-document"))
    stops = {stop.id: stop for stop in made}
    (picture,) = stops["emb"].sides[0].pictures
    assert [label for label in picture.columns if label] == ["0", "4", "8", "12"]
    assert len(picture.columns) == 16
    transposed = made.example(stops["dlayer0.k"]).factors[0]
    assert transposed.title.endswith("transposed: u down, t across")
    levels, _ = pixels(transposed.pictures[0].image)
    T = len(levels)
    assert ((levels == pictures.ABSENT) == np.tri(T, k=-1, dtype=bool)).all()


def test_the_derivative_of_a_tensor_does_not_claim_to_be_the_tensor() -> None:
    made = {stop.id: stop.words for stop in stops_of(load_case("one-document"))}
    assert made["layer0.attn_logits"].startswith("How much each head looks")
    assert made["dlayer0.attn_logits"].startswith("Derivative of: how much each head looks")
    assert made["demb"] == ""


def test_the_example_is_one_sum_on_both_sides() -> None:
    made = stops_of(load_case("one-document"))
    example = made.example(next(stop for stop in made if stop.id == "dlayer0.k"))
    left = [term.addition.product for term in example.stop.terms]
    right = [score * q for _, score, q in example.products]
    assert left == pytest.approx(right[::-1])
    assert sum(right) == pytest.approx(example.stop.element.vectorized)


def test_a_gradient_of_weights_stands_behind_the_derivative_that_it_is_made_of() -> None:
    for name in ("three-layers", "microgpt-243"):
        case = load_case(name)
        found = [stop.id for stop in stops_of(case) if stop.kind != "forward"]
        backward = [one for one in found if one[1:] in taps(case.config)]
        assert backward == [f"d{tap}" for tap in reversed(taps(case.config))]
        for param, users in consumers(case.config).items():
            if param not in taps(case.config):
                last = max(found.index(f"d{user.name}") for user, _ in users)
                between = found[last : found.index(f"d{param}")]
                assert [one for one in between if one in backward] == [found[last]]


def test_names_have_their_layer_only_where_it_is_another() -> None:
    names = {link.text for stop in stops_of(load_case("one-document"))
             for link in (*stop.before, *stop.after)}  # fmt: skip
    assert not any("layer" in name for name in names)
    stop = stop_of(load_case("three-layers"), "dlayer1.mlp_res")
    assert [link.text for link in stop.before] == ["dlayer2.attn_norm", "dlayer2.attn_res"]
    assert [link.text for link in stop.after] == ["dmlp_act", "dmlp_fc2", "dattn_res"]
    assert stop.used_in[0] == "layer2.attn_norm = rmsnorm(layer1.mlp_res)"


def test_the_atlas_says_the_largest_difference_that_there_is() -> None:
    made = stops_of(load_case("two-layers"))
    made.vectorized["forward/layer1.q"] = made.vectorized["forward/layer1.q"] + 0.25
    apart = {stop.id: stop.apart for stop in made}
    assert apart["layer1.q"] == pytest.approx(0.25)
    assert max(size for name, size in apart.items() if name != "layer1.q") < 1e-12


@pytest.mark.parametrize("name", case_names())
def test_every_link_of_the_atlas_of_a_case_leads_somewhere_and_nothing_is_loaded(name: str) -> None:
    page = atlas_of(load_case(name))
    found = Elements(page)
    ids = found.ids()
    assert len(ids) == len(set(ids))
    for address in found.addresses():
        assert address.startswith("data:") or address.removeprefix("#") in ids, address
    for tap in taps(load_case(name).config):
        assert {tap, f"d{tap}"} <= set(ids)
    assert len(page.encode()) < LARGEST_ATLAS


def test_before_and_after_an_update_the_weights_differ_by_the_update() -> None:
    case = load_case("one-document")
    made = stops_of(case, update=True)
    step = next(trace(case, "scalar", "float64", 1))
    np.testing.assert_allclose(made.after["entry/wte"], step["params/wte"], rtol=1e-9)
    titles = [shown.title for stop in made for shown in stop.beside]
    assert {"after the update", "the change", "m after the step"} <= set(titles)


def test_a_model_of_many_layers_is_shown_in_less_detail_and_stays_small() -> None:
    config = load_config(overrides={"n_layer": "4"})
    case = Case("full", "", config, "abcdefghijklmnopqrstuvwxyz", [["abcdefghijklmnop"]])
    page = atlas_of(with_params(case, draw_params(case)), update=True)
    assert len(page.encode()) < LARGEST_ATLAS
    assert " rows more" in page


def test_the_largest_model_takes_a_few_times_as_long_as_its_graph() -> None:
    config = load_config(overrides={"n_embd": "64"})
    case = Case("large", "", config, "abcdefghijklmnopqrstuvwxyz", [["abcdefghijklmnop"]])
    case = with_params(case, draw_params(case))
    made: list[float] = []
    for _ in range(3):
        backend = load_backend("scalar", config, fresh_state(case.params))
        times = [process_time()]
        backend.forward(case.docs(0))
        times.append(process_time())
        atlas_of(case)
        times.append(process_time())
        made.append((times[2] - times[1]) / (times[1] - times[0]))
    assert sorted(made)[1] < 15


def test_the_command_draws_the_default_model_and_emma(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "atlas.html"
    assert microgpt("atlas", "--out", str(out)) == 0
    assert f"{out}: {out.stat().st_size:,} bytes" in capsys.readouterr().out
    page = out.read_text(encoding="utf-8")
    assert "the preset microgpt, after 1,000 steps" in page
    explained = re.findall("<dt>(.*?)</dt>", re.sub("</?code>", "", page))
    assert {"k", "dk", "x, res", "n", "scores", "w, dw", "weights"} <= set(explained)
    said = " ".join(re.sub("<.*?>", "", page.partition('id="texts"')[0]).split())
    assert not re.findall(r"on the (?:left|right)|[Ee]very named number", said)
    assert re.findall(r"<span>(\w+) <small>(\d+)</small></span>", page) == [
        *[("BOS", "26"), ("e", "4"), ("m", "12"), ("m", "12"), ("a", "0")],
        *[("e", "4"), ("m", "12"), ("m", "12"), ("a", "0"), ("BOS", "26")],
    ]
    assert len(page.encode()) < LARGEST_ATLAS


def test_a_run_of_an_accented_alphabet_is_drawn_with_its_step(
    trained: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    run, _ = trained("vectorized")
    out = tmp_path / "atlas.html"
    assert microgpt("atlas", str(run), "--text", "zo\u00e9", "--step", "3", "--out", str(out)) == 0
    page = out.read_text(encoding="utf-8")
    assert "<li>\u00e9" in page
    assert "before and after step 3" in page


def test_the_step_that_is_drawn_is_the_one_that_the_run_took(
    trained: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    run, _ = trained("vectorized")
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    for step in (1, 7):
        out = tmp_path / f"{step}.html"
        assert microgpt("atlas", str(run), "--step", str(step), "--out", str(out)) == 0
        assert f"<dd>{losses[step - 1]:.4g}; after" in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "0"], "--step: expected 1 or more, got 0"),
        (["--step", "1001"], "--step: expected 1 to 1,000, got 1,001"),
        (["--text", "em1"], "the character '1' (U+0031)"),
        (["nowhere"], "there is no run and no checkpoint"),
    ],
)
def test_what_cannot_be_drawn_is_told_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert microgpt("atlas", *arguments, "--out", str(tmp_path / "atlas.html")) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "atlas.html").exists()


@pytest.mark.parametrize(
    ("made", "step", "reason"),
    [
        (["--init-std", "1e10"], [], "scalar stops: the logarithm of 0.0"),
        (["--learning-rate", "1e8"], [], "scalar stops: the logarithm of 0.0"),
        (["--learning-rate", "1e300"], ["--step", "1"], "is not finite everywhere"),
    ],
)
def test_of_a_diverged_run_the_atlas_says_what_went_wrong(
    made: list[str],
    step: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    run, out = str(tmp_path / "run"), str(tmp_path / "atlas.html")
    microgpt("train", "--steps", "2", *made, "--quiet", "--out", run)
    capsys.readouterr()
    assert microgpt("atlas", run, *step, "--out", out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert "so there is nothing to draw; choose an earlier --step" in line


def test_a_model_that_is_too_large_is_refused_before_it_takes_the_memory() -> None:
    config = load_config(overrides={"n_embd": "256", "n_layer": "4"})
    case = Case("large", "", config, "ab", [["ab"]])
    with pytest.raises(MicrogptError, match="take a shorter --text, or a smaller model"):
        atlas_of(with_params(case, {"wte": np.zeros((3000, 256))}))


@pytest.mark.parametrize("command", [["atlas"], ["report", "nowhere"]])
def test_without_the_libraries_the_command_says_what_to_install(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in list(sys.modules):
        if name.startswith(("microgpt.pages", "crosscheck.atlas")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert microgpt(*command) == 2
    assert "python -m pip install jinja2 pygments" in capsys.readouterr().err


# --- the report of runs --------------------------------------------------------------------------

HOSTILE = "<img src=x onerror=alert(1)> & \"'"


def write_run(path: Path, run: Path, losses: np.ndarray[Any, Any], more: str = "") -> Path:
    """A copy of a run with other losses."""
    path.mkdir(parents=True)
    for file in run.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    lines = [
        f'{{"step": {i}, "loss": {loss!r}, "lr": 0.01, "seconds": 0.001}}\n'
        for i, loss in enumerate(losses.tolist(), 1)
    ]
    (path / "metrics.jsonl").write_text("".join(lines) + more, encoding="utf-8")
    return path


def test_samples_that_are_in_the_data_set_are_marked(
    trained: Callable[[str], tuple[Path, Any]],
) -> None:
    run, _ = trained("vectorized")
    (run / "samples.txt").write_text("emma\nzo\u00e9\nxyz\n", encoding="utf-8")
    samples = run_report.seen(run, 0, True).samples
    assert [sample.found for sample in samples] == ["data set", "data set", ""]
    page = run_report.report([run])
    assert "3 samples, 2 of them in the data set" in page


def test_the_first_step_that_differs_is_named(
    trained: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    run, _ = trained("vectorized")
    losses = np.linspace(3, 2, 200)
    other = losses.copy()
    other[122] += 1e-3
    paths = [write_run(tmp_path / name, run, x) for name, x in (("a", losses), ("b", other))]
    paths.append(write_run(tmp_path / "c", run, losses))
    b, c = run_report.twins([run_report.seen(path, i, False) for i, path in enumerate(paths)])
    assert (b.step, b.other, b.common) == (123, "a", 200)
    assert b.largest == pytest.approx(1e-3)
    assert (c.step, c.largest) == (None, 0.0)


@pytest.mark.parametrize(
    ("field", "value", "alike"), [("top_k", 3, 1), ("eval_every", 4, 1), ("beta1", 0.5, 0)]
)
def test_runs_that_learn_alike_are_held_to_each_other(
    trained: Callable[[str], tuple[Path, Any]], field: str, value: Any, alike: int
) -> None:
    run, _ = trained("vectorized")
    one = run_report.seen(run, 0, False)
    other = replace(one, config=replace(one.config, **{field: value}))
    assert len(run_report.twins([one, other])) == alike


def test_lines_that_are_no_metrics_are_counted_and_left_out(
    trained: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    run, _ = trained("vectorized")
    more = 'garbage\n{"step": 1}\n{"step": 2, "loss": NaN, "lr": 1, "seconds": 1}\n[1]\n{"step'
    path = write_run(tmp_path / "a", run, np.linspace(3, 2, 50), more)
    seen = run_report.seen(path, 0, True)
    assert (seen.steps, seen.damaged) == (50, 5)
    assert "5 lines of metrics.jsonl cannot be read" in run_report.report([path])


def test_a_run_of_100_000_steps_takes_no_more_room_than_one_of_a_thousand(
    trained: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    run, _ = trained("vectorized")
    losses = 2 + np.random.default_rng(0).random(100_000)
    long, short = (
        len(run_report.report([write_run(tmp_path / str(n), run, losses[:n])]))
        for n in (100_000, 1_000)
    )
    assert long < 1.1 * short


def test_twenty_runs_with_hostile_names_are_twenty_lines_and_no_elements(
    trained: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    run, _ = trained("vectorized")
    (run / "samples.txt").write_text(HOSTILE + "\n</li><script>alert(1)</script>\n", "utf-8")
    paths = [
        write_run(tmp_path / f"{i} {HOSTILE}", run, np.linspace(3, 2, 60) + i) for i in range(20)
    ]
    page = run_report.report(paths)
    found = Elements(page)
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert not any("onerror" in attrs for _, attrs in found.tags)
    assert all(str(attrs["src"]).startswith("data:") for tag, attrs in found.tags if tag == "img")
    assert sum(text.endswith(HOSTILE) for text in found.texts) >= 40
    assert page.count('class="line ') == 3 * 20


@pytest.mark.parametrize("preset", ["microgpt", "microgpt-243"])
def test_the_command_on_the_page_makes_the_configuration(preset: str) -> None:
    overrides = {"n_layer": "3", "norm_embedding": "false", "dataset": "a b.txt", "seed": "7"}
    config = load_config(preset, overrides)
    words = shlex.split(run_report.command(config, Path("runs/a b")))
    assert words[:2] == ["microgpt", "train"]
    options = dict(zip(words[2::2], words[3::2]))
    assert options.pop("--out") == "runs/a b"
    source = options.pop("--config", "microgpt")
    assert source == preset
    again = {name[2:].replace("-", "_"): text for name, text in options.items()}
    assert load_config(source, again) == config


def test_training_says_how_to_get_its_report_and_that_works(
    tiny: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [x for name, text in tiny.items() for x in (f"--{name.replace('_', '-')}", text)]
    assert microgpt("train", *flags, "--out", "a run") == 0
    said = capsys.readouterr().out.splitlines()[-1].partition("to look at it: ")[2]
    assert microgpt(*shlex.split(said)[1:]) == 0
    assert "The run <code>a run</code>" in Path("report.html").read_text(encoding="utf-8")


def test_a_folder_that_holds_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert microgpt("report", str(tmp_path), "--out", str(tmp_path / "report.html")) == 2
    assert "not a run directory" in capsys.readouterr().err


# --- the map -------------------------------------------------------------------------------------


def outcome_page(case: Case, candidate: list[Step]) -> str:
    outcome = compare(case, trace(case, "scalar", "float64", len(candidate)), candidate)
    return html.of_outcomes("traces", [outcome], "ours", HOSTILE)


def test_a_map_shows_the_first_divergence_and_what_follows() -> None:
    case = load_case("two-layers")
    steps = list(trace(case, "vectorized", "float64", 2))
    steps[1]["backward/dlayer1.attn_out"] = 1.01 * steps[1]["backward/dlayer1.attn_out"]
    steps[1]["gradient/dwte"] = 1.01 * steps[1]["gradient/dwte"]
    outcome = compare(case, trace(case, "scalar", "float64", 2), steps)
    part = html.part(outcome, "traces")
    assert part.first == [2, "backward/dlayer1.attn_out"]
    order = html.rows([part])
    assert order.index("forward/loss") < order.index("backward/dloss")
    assert order.index("backward/dlayer1.q") < order.index("backward/dlayer0.q")
    levels, _ = pixels(html.column(part, {key: i for i, key in enumerate(order)}).image)
    found = {key: levels[i].tolist() for i, key in enumerate(order)}
    assert found["backward/dlayer1.attn_out"][1] == html.FIRST
    assert found["gradient/dwte"][1] == html.FOLLOWS
    assert max(found["forward/logits"]) < html.ABSENT
    reds, _ = pixels(part.errors[0]["image"])
    assert reds.shape == outcome.found[0].shape[1:]  # type: ignore[index]
    assert 1 <= reds.min() <= reds.max() == html.REDS


def test_a_map_of_traces_with_hostile_names_has_no_element_of_theirs() -> None:
    case = load_case("one-document")
    steps = list(trace(case, "vectorized", "float64", 1))
    steps[0]["forward/emb"] = steps[0]["forward/emb"] + 1
    steps[0][f"forward/{HOSTILE}"] = np.ones(3)
    hostile = Case(**{**vars(case), "name": HOSTILE})
    found = Elements(outcome_page(hostile, steps))
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert not any("onerror" in attrs for _, attrs in found.tags)
    assert any(HOSTILE in text for text in found.texts)


def test_what_agrees_has_no_red() -> None:
    case = load_case("one-document")
    page = outcome_page(case, list(trace(case, "vectorized", "float64", 2)))
    assert "They agree" in page
    assert "First" not in page
    assert 'class="failed"' not in page


def test_the_map_of_all_cases_is_small() -> None:
    """As many columns and rows as `pytest crosscheck` compares: five kinds, 22 cases, 5 steps."""
    case = load_case("four-layers")
    step = next(trace(case, "vectorized", "float64", 1))
    rng = np.random.default_rng(0)
    parts = [
        html.Part(about, f"case-{i}", {str(n): {key: 10 ** rng.uniform(-9, 0) for key in step}
                                       for n in range(1, 6)}, [])
        for about in ("a", "b", "c", "d", "e", "f", "g")
        for i in range(22)
    ]  # fmt: skip
    assert len(html.page(parts, [], "", ("scalar", "vectorized")).encode()) < LARGEST_MAP


def test_diff_draws_a_map_of_two_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traces = []
    for backend in ("scalar", "vectorized"):
        traces.append(str(tmp_path / f"{backend}.safetensors"))
        told = ["--case", "one-document", "--backend", backend, "--steps", "2"]
        assert crosscheck(["trace", *told, "--out", traces[-1]]) == 0
    out = tmp_path / "map.html"
    assert crosscheck(["diff", *traces, "--html", str(out)]) == 0
    assert "2 steps" in capsys.readouterr().out
    page = out.read_text(encoding="utf-8")
    assert "Crosscheck of scalar and vectorized" in page
    assert page.count("<figcaption") == 1


def test_the_crosscheck_draws_a_map_of_what_its_processes_compare(tmp_path: Path) -> None:
    out = tmp_path / "map.html"
    told = ["--case", "one-document", "--case", "single-character", "-k", "first or teacher"]
    ran = subprocess.run(
        [sys.executable, "-m", "crosscheck", "test", *told, "--processes", "2", "--html", str(out)],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout
    page = out.read_text(encoding="utf-8")
    sheets = re.findall(r'id="sheet-\d+" data-stop><span tabindex="-1">([^<]+)<', page)
    assert sheets == ["first steps", "steps one by one"]
    assert page.count(">single-character</figcaption>") == 2


def test_the_map_has_the_witness_with_a_column_for_each_side(tmp_path: Path) -> None:
    out = tmp_path / "map.html"
    told = ["-k", "(every_parameter or random_directions) and one-position"]
    ran = subprocess.run(
        [sys.executable, "-m", "crosscheck", "test", *told, "--html", str(out)],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout
    page = out.read_text(encoding="utf-8")
    assert "A column is an implementation, scalar before vectorized" in page
    assert page.count(">one-position</figcaption>") == 2
    assert page.count("one-position: 2 steps") == 2
    assert "<li>dlayer0.attn_wq</li>" in page
    assert "<li>along 20 random directions</li>" in page


def test_a_column_of_the_map_is_the_worst_that_was_noted_for_it() -> None:
    outcome = Outcome("a-thousand-steps")
    for column, share in ((1, 0.1), (1, 0.3), (1, 0.2), (2, 0.05)):
        outcome.note(column, "forward/loss", share)
    assert outcome.shares == {1: {"forward/loss": 0.3}, 2: {"forward/loss": 0.05}}
    assert outcome.worst() == {"forward/loss": 0.3}


def test_a_candidate_has_no_map_and_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def linear_forward(x, w):\n    return x\n")
    told = ["--candidate", "mine.py", "--html", "map.html"]
    ran = subprocess.run(
        [sys.executable, "-m", "crosscheck", "test", *told],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert ran.returncode == 2
    assert "leave --html out" in ran.stdout + ran.stderr
    assert not (tmp_path / "map.html").exists()

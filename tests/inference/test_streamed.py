"""Rows that are not in memory: the same figures as those that are, from parts that are read when they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import elbozoo as ez
from elbozoo.inference.em import EMOptions, run_em
from elbozoo.inference.fit import Fit
from elbozoo.inference.ledger import Ledger, compute_ledger
from elbozoo.inference.method import default_methods, plan, refusal_of_stream
from elbozoo.inference.minibatches import StreamedMinibatches
from elbozoo.inference.rows import Part, Rows, TensorBlock, sample_rows
from elbozoo.inference.streamed import draws_of_each
from elbozoo.models.contract.entry import SupportsEM
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.registry import entry_names, get_entry
from elbozoo.models.contract.sequences import StackedEntry
from elbozoo.stored import StoredData

ROUNDING = 1e-9  # relative: sums of the same terms in another order

STREAMING = [
    name
    for name in entry_names()
    if issubclass(get_entry(name), SupportsEM) and not issubclass(get_entry(name), StackedEntry)
]


def in_blocks(x: Tensor, size: int) -> Rows:
    """Return rows in blocks that do not all have as many."""
    return Rows([TensorBlock(part) for part in x.split(size)], [f"x{i}" for i in range(x.shape[1])])


def simulated(name: str, rows: int) -> Tensor:
    return ez.load_data(f"simulate:{name}", rows=rows).x


def streamed(name: str, x: Tensor, method: str, **options: Any) -> Fit:
    """Fit to rows in blocks of which the fit has a sample."""
    rows = in_blocks(x, 97)
    return plan(name, sample_rows(rows, 100, 0, 50), method, options, rows.names, rows=rows).run(0, progress=False)


def relative(one: float, two: float) -> float:
    return abs(one - two) / abs(two)


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_parts_and_totals_cover_each_row_once_in_order() -> None:
    """Whatever the sizes of blocks and chunks are."""
    x = torch.arange(230.0, dtype=torch.float64).reshape(115, 2)
    for size, chunk in [(115, 200), (40, 7), (40, 40), (1, 3), (114, 1)]:
        rows = in_blocks(x, size)
        parts = list(rows.parts(chunk))
        assert len(rows) == 115 and max(len(part.x) for part in parts) <= chunk
        assert torch.equal(torch.cat([part.x for part in parts]), x)
        assert all(torch.equal(part.x, x[part.start : part.start + len(part.x)]) for part in parts)
        assert rows.total(lambda part: part.x.sum(), torch.add, chunk) == x.sum()


def test_a_sample_has_different_rows_in_their_order_and_each_is_as_likely() -> None:
    """Counts over 400 samples of 10 of 40 rows: a chi-square statistic below its 1 - 1e-9 quantile; all rows if few."""
    from scipy.stats import chi2

    x = torch.arange(40.0, dtype=torch.float64)[:, None]
    counts = torch.zeros(40)
    for seed in range(400):
        rows = sample_rows(in_blocks(x, 7), 10, seed, 3)[:, 0]
        assert (rows.diff() > 0).all() and len(rows) == 10
        counts[rows.long()] += 1

    def statistic(counts: Tensor) -> float:
        # Drawn without replacement, counts vary less than a multinomial's, by the share of rows that is left out.
        return float(((counts - 100) ** 2 / 100).sum() / (1 - 10 / 40))

    assert statistic(counts) < chi2.ppf(1 - 1e-9, 39)
    assert statistic(counts + torch.linspace(-30, 30, 40)) > chi2.ppf(1 - 1e-9, 39)
    assert torch.equal(sample_rows(in_blocks(x, 7), 50, 0, 3), x)


# ---- EM --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STREAMING)
def test_em_on_blocks_is_em_in_memory(name: str) -> None:
    """Every log-likelihood and parameter after 8 iterations; without one block they are others."""
    x = simulated(name, 300)
    options = EMOptions(restarts=1, iterations=8, chunk=64)
    cls = get_entry(name)

    def run(rows: Tensor | Rows) -> tuple[list[float], dict[str, Tensor]]:
        entry = cls.from_data(x)
        found = run_em(entry, rows, options, seed=0, start=x, progress=False)
        return found.trajectory.frame()["log_evidence"].tolist(), found.state

    def difference(one: Any, two: Any) -> float:
        figures = [relative(a, b) for a, b in zip(one[0], two[0], strict=False)]
        states = [float((one[1][key] - two[1][key]).abs().max() / two[1][key].abs().max()) for key in two[1]]
        return max(*figures, *(state for state in states if state == state))

    memory = run(x)
    blocks, fewer = run(in_blocks(x, 71)), run(in_blocks(x[:213], 71))
    assert len(blocks[0]) == len(memory[0])
    assert difference(blocks, memory) < 1e-8
    assert difference(fewer, memory) > 1e-3


# ---- minibatches -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shuffle few numbers together, so that an epoch has several windows."""
    from elbozoo.inference import minibatches

    monkeypatch.setattr(minibatches, "WINDOW", 60)


@pytest.mark.usefixtures("small_window")
@pytest.mark.parametrize("size", [1, 8, 30, 103])
def test_an_epoch_has_each_row_once(size: int) -> None:
    """But for those left over; with its own position, in another order each epoch and for each seed."""
    x = torch.arange(206.0).reshape(103, 2).double()
    rows = in_blocks(x, 17)

    def epochs(seed: int) -> list[list[int]]:
        minibatches = StreamedMinibatches(rows, x[:1], size, torch.Generator().manual_seed(seed))
        found = []
        for _ in range(2):
            batches = [next(minibatches) for _ in range(103 // size)]
            assert all(len(batch.x) == size and batch.total == 103 for batch in batches)
            assert all(torch.equal(batch.x, x[batch.index]) for batch in batches)
            found.append(torch.cat([batch.index for batch in batches]).tolist())
        return found

    first, second = epochs(0)
    assert len(set(first)) == len(first) == 103 // size * size
    assert set(first) <= set(range(103)) and first != sorted(first)
    assert first != second and epochs(0) == [first, second] and epochs(1)[0] != first


@pytest.mark.usefixtures("small_window")
def test_rows_of_distant_blocks_meet() -> None:
    """In a file that is sorted, a minibatch has rows from several of its blocks."""
    x = torch.arange(400.0, dtype=torch.float64)[:, None]
    minibatches = StreamedMinibatches(in_blocks(x, 40), x[:1], 20, torch.Generator().manual_seed(0))
    blocks = [len({int(i) // 40 for i in next(minibatches).index}) for _ in range(20)]
    assert sum(blocks) / len(blocks) > 2


@pytest.mark.usefixtures("small_window")
def test_an_epoch_goes_on_where_it_stood() -> None:
    """From its memory, bit for bit, also at its end and before its beginning."""
    x = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for taken in (0, 3, 12, 13):
        generator = torch.Generator().manual_seed(5)
        minibatches = StreamedMinibatches(in_blocks(x, 9), x[:1], 4, generator)
        for _ in range(taken):
            next(minibatches)
        memory, state = minibatches.memory(), generator.get_state()
        expected = [next(minibatches).index.tolist() for _ in range(15)]
        generator.set_state(state)
        again = StreamedMinibatches(in_blocks(x, 9), x[:1], 4, generator)
        again.recall(memory)
        assert [next(again).index.tolist() for _ in range(15)] == expected


@dataclass(frozen=True)
class Counted:
    """A block that counts the rows that are held at once, as far as it is asked for them."""

    x: Tensor
    asked: list[int]

    def __len__(self) -> int:
        return len(self.x)

    def parts(self, chunk: int) -> Iterator[Tensor]:
        for part in self.x.split(chunk):
            self.asked.append(len(part))
            yield part


def test_no_more_than_a_window_is_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first minibatch of many rows costs a window of them, and not the data set."""
    from elbozoo.inference import minibatches

    monkeypatch.setattr(minibatches, "WINDOW", 2000)
    asked: list[int] = []
    x = torch.zeros(100_000, 2, dtype=torch.float64)
    rows = Rows([Counted(part, asked) for part in x.split(20_000)], ["a", "b"])
    next(StreamedMinibatches(rows, x[:1], 10, torch.Generator().manual_seed(0)))
    assert 1000 <= sum(asked) <= 1250  # rows of two numbers: a window, and at most a part more


# ---- fits and their ledgers ------------------------------------------------------------------------------------------


def test_the_mean_loss_of_an_epoch_is_that_of_all_rows() -> None:
    """An enumerated ELBO has no noise, so minibatches of equal size average to it: to rounding; of 3 of 4, they do not.

    The scale of each minibatch is the number of all rows, of which the fit holds a sample.
    """
    from elbozoo.guides.registry import build_guide
    from elbozoo.inference.objectives import resolve_objective
    from elbozoo.inference.steps import PyroStep
    from elbozoo.inference.training import TrainingOptions
    from elbozoo.models.contract.batch import Batch

    x = simulated("gaussian-mixture", 400)
    entry = get_entry("gaussian-mixture").from_data(x, components=3)
    guide = build_guide("amortized", entry, x)
    options = TrainingOptions()
    step = PyroStep(entry, guide, resolve_objective(options.objective, guide, options), 1, options)
    minibatches = StreamedMinibatches(in_blocks(x, 90), x[:50], 100, torch.Generator().manual_seed(0))
    with isolated(0):
        losses = [float(step.loss(next(minibatches)).detach()) for _ in range(4)]
        whole = float(step.loss(Batch.full(x)).detach())
    assert relative(sum(losses) / 4, whole) < ROUNDING
    assert relative(sum(losses[:3]) / 3, whole) > 1e-4


FITS = [
    ("gaussian-mixture", "em", {"components": 3}),
    ("gaussian-mixture", "amortized", {"components": 3, "steps": 30}),
    ("ppca", "amortized", {"latent_dim": 1, "steps": 30}),
    ("factor-analysis", "shared", {"latent_dim": 1, "steps": 30}),
    ("autoencoder", "amortized", {"latent_dim": 1, "steps": 5, "likelihood": "normal"}),
]


@pytest.mark.parametrize(("name", "method", "options"), FITS, ids=lambda value: str(value) if value else "")
def test_the_ledger_of_parts_is_that_of_the_whole(name: str, method: str, options: dict[str, Any]) -> None:
    """Exact figures to rounding, drawn ones within six standard errors (false alarms below 1e-8 each)."""
    x = simulated(name if name != "autoencoder" else "ppca", 400)
    fit = streamed(name, x, method, **options)
    assert fit.x is None
    found = fit.full_ledger()
    whole = compute_ledger(fit.entry, fit.guide, x, fit.guide_options, seed=5, search=False)
    assert found.rows == 400 and found.log_evidence_kind == whole.log_evidence_kind
    assert found.is_bound == whole.is_bound
    if whole.log_evidence_kind is not None:
        assert relative(found.log_evidence, whole.log_evidence) < ROUNDING
    if not whole.is_bound:
        assert found.elbo != found.elbo
        return
    assert abs(found.elbo - whole.elbo) <= 6 * (found.elbo_se + whole.elbo_se) + ROUNDING * abs(whole.elbo)
    assert 0.5 * whole.elbo_se <= found.elbo_se <= 2 * whole.elbo_se
    assert abs(found.kl - whole.kl) <= 6 * (found.kl_se + whole.kl_se) + ROUNDING * abs(whole.elbo)
    assert fit.elbo() == found.elbo
    evidence = fit.log_evidence()
    assert evidence is not None and relative(evidence.value, whole.log_evidence) < ROUNDING  # type: ignore[arg-type]
    # Of fewer rows it is another ledger.
    part = compute_ledger(fit.entry, fit.guide, x[:300], fit.guide_options, seed=5, search=False)
    assert abs(found.elbo - part.elbo) > 6 * (found.elbo_se + part.elbo_se) + ROUNDING * abs(whole.elbo)


def test_one_q_for_all_rows_is_weighed_on_all_of_them() -> None:
    """A latent of the whole data set: each draw of it meets every part; against all rows at once, to rounding."""
    x = simulated("normal-mean", 400)
    fit = streamed("normal-mean", x, "mean-field", steps=50)
    found = fit.full_ledger()
    whole = compute_ledger(fit.entry, fit.guide, x, fit.guide_options, seed=fit.seed + 7919)
    assert relative(found.elbo, whole.elbo) < ROUNDING and relative(found.elbo_se, whole.elbo_se) < 1e-6
    assert (found.log_evidence_kind, whole.log_evidence_kind) == ("estimate", "exact")
    assert abs(found.log_evidence - whole.log_evidence) < 6 * found.log_evidence_se
    assert found.approximation_gap == found.gap and found.amortization_gap == 0
    fewer = compute_ledger(fit.entry, fit.guide, x[:300], fit.guide_options, seed=fit.seed + 7919)
    assert relative(fewer.elbo, whole.elbo) > 1e-3


def test_ledgers_merge_as_totals_do() -> None:
    """Sums add up, errors by their squares, the kind is that of the worst part, shares are of rows."""
    x = simulated("ppca", 60)
    entry = get_entry("ppca").from_data(x, latent_dim=1)
    from elbozoo.guides.registry import build_guide

    guide = build_guide("shared", entry, x)
    one, two = (compute_ledger(entry, guide, part, ez_options(), seed=3) for part in (x[:20], x[20:]))
    both = one.merge(two)
    assert both.elbo == one.elbo + two.elbo and both.gap == pytest.approx(one.gap + two.gap, rel=1e-12)
    assert both.elbo_se**2 == pytest.approx(one.elbo_se**2 + two.elbo_se**2, rel=1e-12)
    assert both.khat_share == pytest.approx((20 * one.khat_share + 40 * two.khat_share) / 60, rel=1e-12)
    assert both.rows == 60 and both.khat_max == max(one.khat_max, two.khat_max)
    kinds = [Ledger(**{**one.as_dict(), "log_evidence_kind": kind}) for kind in ("exact", "quadrature", "estimate")]  # type: ignore[arg-type]
    assert kinds[0].merge(kinds[1]).log_evidence_kind == "quadrature"
    assert kinds[2].merge(kinds[1]).log_evidence_kind == "estimate"


def ez_options() -> Any:
    from elbozoo.guides.base import GuideOptions

    return GuideOptions()


def test_many_rows_have_fewer_draws_each() -> None:
    """A thousand each for few rows, never fewer than 16, and in between as many as all rows may have together."""
    assert draws_of_each(100) == 1000 and draws_of_each(10**9) == 16
    assert draws_of_each(2**20) == 2**6


def test_the_gap_that_is_not_divided_is_said() -> None:
    """In a note, where the best member would have to be searched for; some rows in memory divide it."""
    x = simulated("ppca", 300)
    fit = streamed("ppca", x, "amortized", latent_dim=1, steps=5)
    assert any("the gap is not divided" in note for note in fit.notes)
    assert fit.ledger()["approximation_gap"] != fit.ledger()["approximation_gap"]
    assert fit.ledger(x[:20])["approximation_gap"] >= 0
    exact = streamed("gaussian-mixture", simulated("gaussian-mixture", 300), "em", components=2)
    assert not any("divided" in note for note in exact.notes) and exact.ledger()["approximation_gap"] == 0


def test_a_streamed_fit_is_saved_and_loaded(tmp_path: Path) -> None:
    """It says the same about new rows; about its own it asks for them."""
    x = simulated("ppca", 300)
    fit = streamed("ppca", x, "amortized", latent_dim=1, steps=5)
    loaded = ez.load_fit(fit.save(tmp_path / "fit"))
    assert loaded.elbo(x[:10]) == fit.elbo(x[:10])
    with pytest.raises(InvalidInput, match=r"300 rows of the fit, which are not in memory, .* pass rows x"):
        fit.transform()
    with pytest.raises(InvalidInput, match="does not carry its data"):
        loaded.transform()
    assert fit.transform(x[:10]).shape == (10, 1)


# ---- what does not stream --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method", "reason"),
    [
        ("gaussian-mixture", "mean-field", "parameters of its own for each row"),
        ("ppca", "closed-form", "goes over all rows at each step"),
        ("vae", "em", "goes over all rows at each step"),
        ("normal-mean", "nuts", "goes over all rows at each step"),
        ("normal-mean", "laplace", "about all rows at once"),
        ("normal-mean", "exact", "about all rows at once"),
        ("hidden-markov-model", "em", "belong together"),
        ("eight-schools", "mean-field", "as many values as there are rows"),
    ],
)
def test_what_needs_all_rows_is_refused(name: str, method: str, reason: str) -> None:
    """In one line, with a way out."""
    x = ez.load_data("eight-schools").x if name == "eight-schools" else simulated(name, 50)
    rows = in_blocks(x, 20)
    with pytest.raises(InvalidInput, match=f"not in memory, .*{reason}.*stream=False") as caught:
        plan(name, x, method, {}, rows.names, rows=rows)
    assert "\n" not in str(caught.value)
    plan(name, x, method, {}, rows.names)


def test_default_methods_that_stream_are_those_without_parameters_for_each_row() -> None:
    """EM and an encoder stay of the three."""
    from elbozoo.inference.method import resolve_method

    entry = get_entry("gaussian-mixture").example()
    streaming = [m for m in default_methods(entry) if refusal_of_stream(resolve_method(m, entry), entry) is None]
    assert streaming == ["em", "amortized"]


def test_rows_that_the_model_does_not_take_are_found_in_any_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A count of -1 in the last block, which is not in the sample, or in the sample; without it the fit runs."""
    from elbozoo import preparation

    monkeypatch.setattr(preparation, "SAMPLE_ROWS", 30)
    x = simulated("poisson-mixture", 300)

    def fit(x: Tensor) -> Fit:
        rows = in_blocks(x, 100)
        return ez.fit("poisson-mixture", StoredData("counts", rows, list(rows.names)), method="em", components=2)

    assert fit(x).ledger()["rows"] == 300
    x[-1, 0] = -1
    assert not (sample_rows(in_blocks(x, 100), 30, 0, 100)[:, 0] == -1).any()
    with pytest.raises(InvalidInput, match=r"rows 201 to 300: .*-1"):
        fit(x)
    x[:, 0] = -1
    with pytest.raises(InvalidInput, match=r"a sample of 30 rows: .*-1"):
        fit(x)


@pytest.mark.parametrize("given", [{"test": 0.2}, {"validation": 0.5}, {"binarise": "threshold"}])
def test_rows_are_not_set_aside_or_drawn_anew_while_they_stream(given: dict[str, Any]) -> None:
    """Shares and binary pixels are of data in memory; data of their own are taken."""
    x = simulated("ppca", 100)
    rows = in_blocks(x, 30)
    data = StoredData("file.npy", rows, list(rows.names))
    with pytest.raises(InvalidInput, match=f"file.npy: found {next(iter(given))}=.*not in memory.*--no-stream"):
        ez.fit("ppca", data, guide="amortized", latent_dim=1, steps=2, **given)
    fit = ez.fit("ppca", data, guide="amortized", latent_dim=1, steps=2, test=x[:20] + 0.1)
    assert fit.heldout()["heldout_rows"] == 20


def test_what_all_rows_share_and_new_rows_do_not_go_together() -> None:
    """Held-out rows depend on those of the fit through a latent of the whole data set: refused before the fit."""
    x = simulated("normal-mean", 60)
    rows = in_blocks(x, 20)
    with pytest.raises(InvalidInput, match=r"test: found it with data that are not in memory and a latent"):
        ez.fit("normal-mean", StoredData("x", rows, list(rows.names)), guide="mean-field", test=x[:10])


def test_the_evidence_of_parts_that_share_a_latent_does_not_add_up() -> None:
    """Without a density there are no draws to estimate it by: none is given, instead of a sum over parts."""
    x = simulated("normal-mean", 400)
    ledger = streamed("normal-mean", x, "delta", steps=5).full_ledger()
    assert ledger.log_evidence != ledger.log_evidence and ledger.log_evidence_kind is None
    assert ledger.rows == 400 and not ledger.is_bound


def test_a_sorted_file_is_as_good_as_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """A column that is constant within most parts and not over all is no constant column; one that is, is refused."""
    from elbozoo import preparation

    monkeypatch.setattr(preparation, "READ_AT_ONCE", 50)
    monkeypatch.setattr(preparation, "FEW", 20)
    x = simulated("gaussian-mixture", 400)

    def fit(column: Tensor) -> Fit:
        rows = in_blocks(torch.cat([x, column[:, None]], 1), 100)
        data = StoredData("sorted", rows, list(rows.names))
        return ez.fit("gaussian-mixture", data, method="em", components=2, covariance="diagonal", restarts=1)

    late = (torch.arange(400) >= 380).double()
    assert fit(late).ledger()["rows"] == 400
    with pytest.raises(InvalidInput, match=r"columns .3. .* are constant"):
        fit(torch.zeros(400, dtype=torch.float64))


def test_the_bound_is_held_against_the_evidence_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """An oracle that is too low by little in each row, which no part can tell from chance, is found out."""
    from elbozoo.models.contract.errors import NumericalFailure
    from elbozoo.models.ppca import PPCA

    x = simulated("ppca", 4000)
    fit = streamed("ppca", x, "exact", latent_dim=1, steps=1)
    assert fit.ledger()["gap"] == pytest.approx(0, abs=1e-6)
    truth = PPCA.log_evidence
    monkeypatch.setattr(PPCA, "log_evidence", lambda self, x: truth(self, x) - 1e-3)
    with pytest.raises(NumericalFailure, match="exceeds log p"):
        fit.ledger()


def test_errors_of_quadrature_add_up() -> None:
    """They are upper estimates and no standard deviations; those of draws are."""
    from elbozoo.inference.ledger import joined_error

    assert joined_error("quadrature", 3.0, 4.0) == 7.0
    assert joined_error("estimate", 3.0, 4.0) == joined_error("exact", 3.0, 4.0) == 5.0


def test_a_checkpoint_of_other_rows_is_refused(tmp_path: Path) -> None:
    """Also where only rows outside the sample are others."""
    x = simulated("ppca", 600)

    def run(x: Tensor, steps: int) -> Fit:
        from elbozoo.inference.records import Records

        rows = in_blocks(x, 97)
        records = Records.parse(tmp_path)
        options = {"latent_dim": 1, "steps": steps}
        ready = plan("ppca", x[:50], "amortized", options, rows.names, records, rows=rows)
        return ready.run(0, progress=False)

    run(x, 5)
    with pytest.raises(InvalidInput, match="found a checkpoint of data of shape"):
        run(torch.cat([x[:50], 2 * x[50:]]), 8)
    assert len(run(x, 8).trajectory) == 8


def test_part_is_where_it_says() -> None:
    """Its first row is at its start."""
    assert Part(torch.zeros(2, 1), 3).start == 3

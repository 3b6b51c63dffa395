# SPDX-License-Identifier: Apache-2.0
"""A step waits for no device; losses that nobody waited for are looked at in time; compiled encoders train alike."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden import assert_close
from hostile import on_digits
from test_resume import assert_equal_to_the_bit
from tiny_recipes import tiny
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kinfold import checkpoint, distributed, meter
from kinfold.data.loader import Batch, Loader
from kinfold.data.sources import open_source
from kinfold.devices import to_device
from kinfold.encoders import Encoder, SplitBatchNorm
from kinfold.errors import UserError
from kinfold.learner import Learner
from kinfold.log import read_metrics
from kinfold.memory import Comparison, Queue
from kinfold.methods import METHODS, MoCo
from kinfold.optim import build_optimizer
from kinfold.pretrain import pretrain
from kinfold.reading import parse, plain
from kinfold.recipe import Recipe
from kinfold.training import Training, build_learner
from kinfold.views import Augmentation, Views

# No waiting.

PAPER = {"name": "invp", "positives": 5, "start_epoch": 1, "sets": "paper"}
WATCHED: list[tuple[str, dict[str, Any]]] = [
    ("moco", {"batch_norm": {"key_splits": 4, "query_splits": 4, "shuffle_keys": True}}),
    ("ressl", {}),
    ("sce", {"accumulate": 2, "optimizer": {"name": "lars"}}),
    ("co2", {"memory": {"name": "batch"}, "optimizer": {"name": "adamw"}}),
    ("invp", {}),
    ("invp", {"method": PAPER, "memory": {"name": "bank", "nearest": 64, "repeats": False}}),
]
"""recipes of every method, with all that a step can do"""

LOOKING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.unique_dim.default,
    torch.ops.aten._unique2.default,
}
"""operations whose result the host cannot go on without"""


class Waited(Exception):
    """The host has waited for the device."""


class NoTensorsFromNumbers(TorchFunctionMode):
    """Raises where numbers are made a tensor on another device, which copies them and waits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type != "cpu":
            raise Waited(f"{func.__name__} on {kwargs['device']}")
        return func(*args, **kwargs)


class NoWaiting(TorchDispatchMode):
    """Raises where an operation on tensors of `device` makes the host wait."""

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.device = device
        self.sent = 0
        self.numbers = NoTensorsFromNumbers()

    def __enter__(self) -> NoWaiting:
        self.numbers.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.numbers.__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in LOOKING and args[0].device.type == self.device:
            raise Waited(f"{func}")
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            if masks:
                raise Waited(f"{func} with a mask")
        if func is torch.ops.aten._to_copy.default:
            self.copied(args[0].device, kwargs.get("device", args[0].device), kwargs.get("non_blocking", False))
        if func is torch.ops.aten.copy_.default:
            self.copied(args[1].device, args[0].device, args[2] if len(args) > 2 else False)
        return func(*args, **kwargs)

    def copied(self, origin: torch.device, goal: torch.device, non_blocking: bool) -> None:
        """Raise for a copy between host and device that is not on its way while the host goes on."""
        if origin.type == goal.type:
            return
        if goal.type != self.device or not non_blocking:
            raise Waited(f"a copy from {origin} to {goal}")
        self.sent += 1


def training_on(recipe: Recipe, device: str, folder: Path, *, images: int = 96) -> Training:
    source = open_source("digits", limit=images)
    loader = Loader(
        source,
        recipe.views,
        channels=1,
        mean=recipe.images.mean,
        std=recipe.images.std,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        device=device,
        resident=True,
    )
    learner = build_learner(recipe, images=len(source)).train().to(device)
    return Training(
        recipe=recipe,
        folder=folder,
        source=source,
        loader=loader,
        learner=learner,
        optimizer=build_optimizer(recipe.optimizer, learner.encoder),
        device=torch.device(device),
    )


@pytest.fixture
def _autocast_knows_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed precision is for real devices only."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


@pytest.mark.usefixtures("_autocast_knows_meta")
@pytest.mark.parametrize(("method", "changes"), WATCHED)
def test_a_step_waits_for_nothing(method: str, changes: dict[str, Any], tmp_path: Path) -> None:
    # A tensor on the device "meta" has no numbers: whatever asks for one cannot go on.
    recipe = parse(Recipe, {**plain(tiny(method)), **changes}, source="test")
    training = training_on(recipe, "meta", tmp_path, images=64)
    batches = list(training.loader.epoch(2))
    with NoWaiting() as told:
        for batch in batches:
            assert all(view.device.type == "meta" for view in batch.views)
            training.take_step(batch, 2)
    assert (told.sent > 0) == recipe.batch_norm.shuffle_keys
    assert len(training.unseen) == training.step == 2


@pytest.mark.usefixtures("_autocast_knows_meta")
def test_making_a_batch_from_a_set_that_lives_on_the_device_waits_for_nothing(tmp_path: Path) -> None:
    batches = training_on(tiny("moco"), "meta", tmp_path).loader.epoch(0)
    next(batches)  # what is worked out once a run may be waited for
    with NoWaiting() as told:
        assert len(list(batches)) == 2
    assert told.sent > 0


def test_every_method_of_the_package_is_watched() -> None:
    assert {method for method, _ in WATCHED} == set(METHODS)


def test_what_waits_is_noticed() -> None:
    there, mask = torch.zeros(3, device="meta"), torch.zeros(3, dtype=torch.bool, device="meta")

    def fill() -> None:
        there[mask] = there + 1.0

    def numbers() -> Tensor:
        return torch.tensor([1.0], device="meta")

    for asks in (there.sum().item, lambda: there[mask], fill, there.cpu, lambda: torch.ones(3).to("meta"), numbers):
        with NoWaiting(), pytest.raises(Waited):
            asks()
    with NoWaiting() as told:
        torch.ones(3).to("meta", non_blocking=True)
    assert told.sent == 1


def test_nothing_is_read_from_memory_that_was_let_go() -> None:
    # On Apple's devices a copy that is not waited for reads its source later (torch's issue 189690).
    asked: dict[str, bool] = {}

    class Sent:
        def to(self, device: torch.device, *, non_blocking: bool) -> None:
            asked[device.type] = non_blocking

    source: Any = Sent()
    for name in ("cuda", "mps"):
        to_device(source, torch.device(name))
    assert asked == {"cuda": True, "mps": False}


# Losses that nobody waited for.


@contextmanager
def as_on_a_gpu() -> Iterator[pytest.MonkeyPatch]:
    """Losses are looked at where a GPU's would be: at some steps only."""
    real = Training.__post_init__

    def made(self: Training) -> None:
        real(self)
        self.looks_at_once = False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "__post_init__", made)
        yield patch


def fail_at(patch: pytest.MonkeyPatch, number: int, spoil: float = float("nan")) -> None:
    """Make the loss of step `number` no number."""
    calls = 0
    real = MoCo.loss

    def loss(self: MoCo, seen: Comparison, epoch: int) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        terms = real(self, seen, epoch)
        return {name: value * (spoil if calls == number + 1 else 1.0) for name, value in terms.items()}

    patch.setattr(MoCo, "loss", loss)


def test_looking_later_changes_no_result(tmp_path: Path) -> None:
    pretrain(tiny("sce"), on_digits(tmp_path / "at-once"), quiet=True)
    with as_on_a_gpu():
        pretrain(tiny("sce"), on_digits(tmp_path / "later", log_every=4), quiet=True)
    first, second = checkpoint.load_latest(tmp_path / "at-once"), checkpoint.load_latest(tmp_path / "later")
    assert first is not None
    assert second is not None
    assert_equal_to_the_bit(first.state, second.state)


@pytest.mark.parametrize("settings", [{"log_every": 6}, {"log_every": 100, "checkpoint_steps": 3}], ids=repr)
def test_a_loss_seen_later_names_its_own_step_and_images_and_nothing_is_written_after_it(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter.Rounds, "due", lambda *_: False)
    recipe, folder = tiny("moco", epochs=4), tmp_path / "run"
    with as_on_a_gpu() as patch:
        fail_at(patch, 4)
        with pytest.raises(UserError, match=r"not finite at step 4: \w+ nan") as told:
            pretrain(
                recipe, on_digits(folder, **{"checkpoint_steps": 2, "checkpoint_every": 100, **settings}), quiet=True
            )
    steps = [path.stem for path in checkpoint.standing(folder)]
    assert steps[0] <= "step-00000004"
    # The checkpoint of step 4 holds the weights that have just failed.
    good = next(step for step in steps if step < "step-00000004")
    assert f"{good}.pt" in str(told.value)
    assert all(line["step"] <= 4 for line in read_metrics(folder))
    training = training_on(recipe, "cpu", tmp_path)
    batch = list(training.loader.epoch(1))[1]  # three steps an epoch
    names = [training.source.name(int(position)) for position in batch.index]
    assert (folder / "not-finite-00000004-0.txt").read_text(encoding="utf-8").splitlines() == names


def test_a_probe_looks_at_no_encoder_that_a_bad_step_has_ruined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter.Rounds, "due", lambda *_: False)
    with as_on_a_gpu() as patch:
        fail_at(patch, 1)
        run = on_digits(tmp_path / "run", log_every=100, checkpoint_steps=None, checkpoint_every=100, probe_every=1)
        with pytest.raises(UserError, match="not finite at step 1"):
            pretrain(tiny("moco"), run, quiet=True)
    assert [line["epoch"] for line in read_metrics(tmp_path / "run")] == [0]


def test_a_checkpoint_that_is_asked_for_directly_looks_first(tmp_path: Path) -> None:
    with as_on_a_gpu() as patch:
        training = training_on(tiny("moco"), "cpu", tmp_path)
        fail_at(patch, 0, float("inf"))
        for batch in training.loader.epoch(0):
            training.take_step(batch, 0)
    with pytest.raises(UserError, match="not finite at step 0: instance inf"):
        training.save()
    assert checkpoint.standing(tmp_path) == []


def test_a_process_whose_loss_was_ruined_by_another_one_says_whose_step_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with as_on_a_gpu():
        training = training_on(tiny("moco"), "cpu", tmp_path)
        for batch in training.loader.epoch(0):
            training.take_step(batch, 0)
    monkeypatch.setattr(distributed, "largest", lambda number, device: max(number, -1))
    with pytest.raises(UserError, match="not finite at step 1 in another process"):
        training.look()


# When the processes look up together.


def test_rounds_come_about_once_a_second_at_the_slowest_processs_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now, others = [0.0], [0]
    monkeypatch.setattr(meter, "time", SimpleNamespace(monotonic=lambda: now[0]))
    rounds = meter.Rounds(10)
    assert not rounds.due(10)
    assert rounds.due(11)
    now[0] = 0.1
    assert rounds.agree(11, 0, torch.device("cpu")) == 0
    assert (rounds.due(20), rounds.due(21)) == (False, True)
    monkeypatch.setattr(distributed, "largest", lambda number, device: max(number, others[0]))
    others[0] = 500_000  # another process takes half a second for a step
    now[0] = 1.1
    rounds.agree(21, 0, torch.device("cpu"))
    assert (rounds.due(22), rounds.due(23)) == (False, True)
    others[0] = 60_000_000
    rounds.agree(23, 0, torch.device("cpu"))
    assert rounds.due(24)
    others[0] = 0
    now[0] = 1.1001
    rounds.agree(24, 0, torch.device("cpu"))
    assert (rounds.due(123), rounds.due(124)) == (False, True)  # a hundred steps at most


def test_a_signal_to_one_process_reaches_all_at_the_next_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "largest", lambda number, device: max(number, int(signal.SIGTERM)))
    assert meter.Rounds(0).agree(1, 0, torch.device("cpu")) == signal.SIGTERM


# Encoders, compiled.


@pytest.fixture
def _quick_compiler(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """torch.compile up to the point where code would be made, and what it was asked for."""
    asked: list[dict[str, Any]] = []
    real = torch.compile

    def compile_(call: Any, **settings: Any) -> Any:
        asked.append(settings)
        return real(call, backend="eager", dynamic=settings["dynamic"])

    monkeypatch.setattr(torch, "compile", compile_)
    return asked


def trained(recipe: Recipe, folder: Path, how: bool | str, batches: list[Batch], start: Any = None) -> dict[str, Any]:
    training = training_on(recipe, "cpu", folder)
    if start is not None:
        training.learner.load_state_dict(start["learner"])
        training.optimizer.load_state_dict(start["optimizer"])
        training.step = start["step"]
    if how:
        training.learner.compile_encoders(graphs=how == "graphs")
    for batch in batches:
        training.take_step(batch, 0)
    return copy.deepcopy(
        {
            "learner": training.learner.state_dict(),
            "optimizer": training.optimizer.state_dict(),
            "step": training.step,
        }
    )


def test_a_run_goes_on_compiled_and_back(
    tmp_path: Path,
    _quick_compiler: list[dict[str, Any]],  # noqa: PT019
) -> None:
    torch._dynamo.reset()
    recipe = tiny("moco", batch_norm={"key_splits": 4, "query_splits": 2, "shuffle_keys": True})
    batches = list(training_on(recipe, "cpu", tmp_path).loader.epoch(0))
    expected = trained(recipe, tmp_path, False, batches)
    state = None
    for how, batch in zip((False, "graphs", False), batches, strict=True):
        state = trained(recipe, tmp_path, how, [batch], state)
    assert state is not None
    assert_equal_to_the_bit(expected, state)
    assert [asked["mode"] for asked in _quick_compiler] == ["reduce-overhead"] * 2


class Replayed(nn.Module):
    """An encoder whose output always lies in the same memory, as that of a CUDA graph does."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.out: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        z: Tensor = self.encoder(images)  # [B, D]
        if torch.is_grad_enabled():
            return z
        self.out = z if self.out is None else self.out.copy_(z)
        return self.out


@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
def test_with_graphs_nothing_that_is_kept_lies_in_a_graphs_memory(shuffle: bool) -> None:
    def learner(graphs: bool) -> Learner:
        torch.manual_seed(5)
        views = Views(augment=(Augmentation(size=4), Augmentation(size=4)), pairs=((0, 1), (1, 0)))
        made = Learner(
            method=MoCo(),
            views=views,
            encoder=Encoder(nn.Sequential(nn.Conv2d(1, 5, 4), nn.Flatten(), nn.Tanh()), nn.Linear(5, 3)),
            memory=Queue(20, 3),
        )
        made.shuffle_keys = shuffle
        if graphs:
            made.compile_encoders(graphs=True)
            assert made.key_encoder is not None
            # In place of compiled encoders: code is only made when one is called.
            made.key_encoder = Replayed(Encoder(made.key_encoder.backbone, made.key_encoder.head))  # type: ignore[assignment]
            made.encoder = Encoder(made.encoder.backbone, made.encoder.head)
        return made

    views, index = [torch.randn(6, 1, 4, 4) for _ in range(2)], torch.arange(6)
    expected_losses, expected = learner(False)(views, index, 0)
    graphed = learner(True)
    losses, memos = graphed(views, index, 0)
    replayed: Any = graphed.key_encoder
    replayed(torch.randn(6, 1, 4, 4))  # the next step's replay, before the memory has taken the keys
    assert_close(losses["instance"], expected_losses["instance"])
    for memo, keys in zip(memos, expected, strict=True):
        assert torch.equal(memo[0], keys[0])


def test_graphs_are_refused_where_gradients_are_summed_up(tmp_path: Path) -> None:
    run = on_digits(tmp_path / "run", compile="graphs")
    with pytest.raises(UserError, match=r"compile=graphs is for one process.*accumulate=2.*compile=true"):
        pretrain(tiny("moco", accumulate=2), run, quiet=True)
    assert plain(run)["compile"] == "graphs"


# Split batch norm keeps the memory format.


@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize("channels", [1, 5])
def test_split_batch_norm_gives_channels_last_images_what_it_gives_others(side: int, channels: int) -> None:
    def gradients(x: Tensor) -> list[Tensor]:
        norm = SplitBatchNorm(channels, 4).double()
        norm.weight.data = torch.linspace(0.5, 2, channels, dtype=torch.float64)
        y = norm(x.requires_grad_())
        assert (
            channels == 1
            or side == 1
            or y.is_contiguous(memory_format=torch.channels_last) == x.is_contiguous(memory_format=torch.channels_last)
        )
        found = torch.autograd.grad((y * probe).sum(), [x, norm.weight, norm.bias])
        return [y, *found, norm.running_mean, norm.running_var]  # type: ignore[list-item]

    probe = torch.randn(8, channels, side, side, dtype=torch.float64)
    x = torch.randn(8, channels, side, side, dtype=torch.float64)
    plain_, last = gradients(x.clone()), gradients(x.clone(memory_format=torch.channels_last))
    for given, expected in zip(last, plain_, strict=True):
        assert_close(given, expected)

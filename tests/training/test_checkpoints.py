import itertools
import os
import threading
import time
from concurrent.futures import wait

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_trainer import assert_same, batches, fit, new_model, new_trainer, weights

from transfer.core import files
from transfer.training import checkpoints
from transfer.training.checkpoints import RunCheckpoint
from transfer.training.optimizers import FusedAdam, FusedSGD


def with_dropout(**arguments):
    return new_trainer(new_model(dropout=0.5), **arguments)


def names(directory):
    return sorted(path.stem for path in directory.glob("*.index"))


def interrupted_after(steps):
    """Batches that raise ``KeyboardInterrupt`` after a number of steps, counted over all epochs."""
    count = itertools.count()

    def cut_off(epoch, first):
        for batch in batches(epoch, first):
            if next(count) == steps:
                raise KeyboardInterrupt
            yield batch

    return cut_off


@pytest.mark.slow_variants
@pytest.mark.parametrize("steps", [0, 1, 3, 4, 6, 11])
def test_run_interrupted_anywhere_is_bit_identical(tmp_path, steps):
    history, rest = keras.callbacks.History(), keras.callbacks.History()
    whole = fit(with_dropout(mixup=0.2), epochs=3, callbacks=[history])
    with pytest.raises(KeyboardInterrupt):
        with_dropout(mixup=0.2).fit(
            interrupted_after(steps),
            epochs=3,
            steps_per_epoch=4,
            checkpoint=RunCheckpoint(tmp_path),
        )
    resumed = with_dropout(mixup=0.2)
    checkpoint = RunCheckpoint(tmp_path)
    assert checkpoint.restore(resumed)
    assert (resumed.epoch, resumed.step) == (steps // 4, steps)
    fit(resumed, epochs=3, checkpoint=checkpoint, callbacks=[rest])
    assert_same(weights(whole.model), weights(resumed.model))
    assert rest.history["loss"] == history.history["loss"][steps // 4 :]
    assert rest.history["accuracy"] == history.history["accuracy"][steps // 4 :]


@pytest.mark.slow
def test_interrupted_validation_of_averages_restores_the_weights(tmp_path):
    """The checkpoint that is then written has the weights, and the run ends as if uninterrupted."""

    def new():
        return new_trainer(optimizer=FusedAdam(0.05, use_ema=True, ema_momentum=0.7))

    def stop():
        raise KeyboardInterrupt

    whole = fit(new(), epochs=2, validate=dict)
    with pytest.raises(KeyboardInterrupt):
        fit(new(), epochs=2, validate=stop, checkpoint=RunCheckpoint(tmp_path))
    resumed, checkpoint = new(), RunCheckpoint(tmp_path)
    assert checkpoint.restore(resumed)
    fit(resumed, epochs=2, validate=dict, checkpoint=checkpoint)
    assert_same(weights(whole.model), weights(resumed.model))


def test_no_checkpoint_is_saved_within_uninterrupted_code(tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 2:
                raise KeyboardInterrupt  # a second signal, within a step

    with pytest.raises(KeyboardInterrupt):
        fit(new_trainer(), 2, checkpoint=RunCheckpoint(tmp_path), callbacks=[Stop()])
    assert names(tmp_path) == []


def test_checkpoints_are_saved_within_an_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_SYNC_S", 0.0)
    seen = []

    class Recorder(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            checkpoint.wait()
            seen.append(names(tmp_path))

    checkpoint = RunCheckpoint(tmp_path, every_s=0)
    fit(new_trainer(), 1, checkpoint=checkpoint, callbacks=[Recorder()])
    assert seen == [[], ["step-1"], ["step-1", "step-2"], ["step-2", "step-3"]]
    assert names(tmp_path) == ["step-4", "step-5"]


def test_damaged_checkpoint_falls_back_to_previous(tmp_path):
    whole = fit(with_dropout(), epochs=3)
    fit(with_dropout(), epochs=2, checkpoint=RunCheckpoint(tmp_path))
    (data,) = tmp_path.glob("step-2.data*")
    damaged = bytearray(data.read_bytes())
    damaged[20] ^= 1
    data.write_bytes(damaged)
    resumed, checkpoint = with_dropout(), RunCheckpoint(tmp_path)
    assert checkpoint.restore(resumed)
    (line,) = checkpoint.damaged
    assert "step-2' cannot be read" in line
    assert resumed.epoch == 1
    assert names(tmp_path) == ["step-1"]
    fit(resumed, epochs=3, checkpoint=checkpoint)
    assert_same(weights(whole.model), weights(resumed.model))


def test_temporary_files_of_killed_session_are_removed(tmp_path):
    trainer, checkpoint = new_trainer(), RunCheckpoint(tmp_path)
    fit(trainer, 1, checkpoint=checkpoint)
    (tmp_path / ".writing-step-2.index").write_bytes(b"half")  # by an earlier version
    for folder in (".writing-step-2_temp", ".saving-0123456789abcdef/step-2_temp"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "part-00000-of-00001.index").write_bytes(b"half")
    assert RunCheckpoint(tmp_path).restore(new_trainer())
    checkpoint.save(trainer)
    checkpoint.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"step-{number}.{end}" for number in (1, 2) for end in ("data-00000-of-00001", "index")
    ]


def test_interrupted_validation_restores_random_states(tmp_path):
    def validate():
        trainer.model(np.zeros((4, 8), np.float32), training=True)  # draws random numbers
        raise KeyboardInterrupt

    trainer = with_dropout()
    with pytest.raises(KeyboardInterrupt):
        fit(trainer, 2, validate=validate, checkpoint=RunCheckpoint(tmp_path))
    resumed, whole = with_dropout(), fit(with_dropout(), 2)
    RunCheckpoint(tmp_path).restore(resumed)
    assert (resumed.epoch, resumed.sums.num_batches) == (0, 4)
    assert_same(weights(fit(resumed, 2).model), weights(whole.model))


@pytest.mark.parametrize("part", ["index", "data-00000-of-00001"])
def test_restore_fails_if_all_checkpoints_are_damaged(tmp_path, part):
    fit(new_trainer(), epochs=1, checkpoint=RunCheckpoint(tmp_path))
    path = tmp_path / f"step-1.{part}"
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(ValueError, match="no readable checkpoint is left: .*step-1'"):
        RunCheckpoint(tmp_path).restore(new_trainer())


def test_restore_without_checkpoints_returns_false(tmp_path):
    assert not RunCheckpoint(tmp_path).restore(new_trainer())
    assert RunCheckpoint(tmp_path).best_weights(new_trainer()) is None
    (tmp_path / "best-0.index").write_bytes(b"of a run that was killed before its first checkpoint")
    assert not RunCheckpoint(tmp_path).restore(new_trainer())
    assert RunCheckpoint(tmp_path).best_weights(new_trainer()) is None


def test_damaged_best_weights_are_named(tmp_path):
    fit(new_trainer(), 1, validate=lambda: {"loss": 1.0}, checkpoint=RunCheckpoint(tmp_path))
    (tmp_path / "best-0.index").write_bytes(b"")
    with pytest.raises(ValueError, match="best weights of the run, .*best-0', cannot be read"):
        RunCheckpoint(tmp_path).best_weights(new_trainer())


def test_removed_folder_is_not_recreated(tmp_path):
    checkpoint = RunCheckpoint(tmp_path / "run")
    trainer = fit(new_trainer(), epochs=1, checkpoint=checkpoint)
    for path in (tmp_path / "run").iterdir():
        path.unlink()
    (tmp_path / "run").rmdir()
    with pytest.raises(FileNotFoundError, match="was removed while the run went on"):
        fit(trainer, epochs=2, checkpoint=checkpoint)
    assert not (tmp_path / "run").exists()


def test_folder_removed_while_a_checkpoint_is_written_is_noticed(tmp_path, monkeypatch):
    checkpoint = RunCheckpoint(tmp_path / "run")
    write = tf.train.Checkpoint.write

    def write_after_removal(self, path):  # TensorFlow creates the folders of ``path`` again
        (tmp_path / "run").rename(tmp_path / "trash")
        return write(self, path)

    monkeypatch.setattr(tf.train.Checkpoint, "write", write_after_removal)
    with pytest.raises(FileNotFoundError, match="was removed while the run went on"):
        fit(new_trainer(), epochs=1, checkpoint=checkpoint)
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


def test_folder_removed_while_files_are_synced_is_noticed(tmp_path, monkeypatch):
    checkpoint = RunCheckpoint(tmp_path / "run")

    def remove(path):
        if (tmp_path / "run").exists():
            (tmp_path / "run").rename(tmp_path / "trash")
        os.open(path, os.O_RDONLY)

    monkeypatch.setattr(files, "sync", remove)
    with pytest.raises(FileNotFoundError, match="was removed while the run went on"):
        fit(new_trainer(), epochs=1, checkpoint=checkpoint)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), FileNotFoundError()])
def test_checkpoint_that_cannot_be_synced_does_not_count_as_complete(tmp_path, monkeypatch, error):
    checkpoint = RunCheckpoint(tmp_path)
    trainer = fit(new_trainer(), epochs=1, checkpoint=checkpoint)

    def fail(path):
        raise error

    monkeypatch.setattr(files, "sync", fail)
    monkeypatch.setattr(checkpoints, "_SYNC_S", 0)
    with pytest.raises(OSError, match="cannot write checkpoint .*step-2.*; step-1 is complete"):
        fit(trainer, epochs=2, checkpoint=checkpoint)


def test_best_weights_are_kept_with_last_checkpoint(tmp_path):
    losses = iter([3.0, 1.0, 2.0, 1.5])
    seen = []

    def validate():
        seen.append(weights(trainer.model))
        return {"loss": next(losses)}

    trainer, checkpoint = new_trainer(), RunCheckpoint(tmp_path)
    fit(trainer, 4, validate=validate, checkpoint=checkpoint)
    assert names(tmp_path) == ["best-1", "step-3", "step-4"]
    assert_same(RunCheckpoint(tmp_path).best_weights(new_trainer()), seen[1])
    resumed = new_trainer()
    RunCheckpoint(tmp_path).restore(resumed)
    assert resumed.best_loss == 1.0


def test_best_weights_of_repeated_epoch_are_deleted(tmp_path, monkeypatch):
    def killed(self, name, state):
        if name == "step-3":
            raise OSError("killed between the best weights and the checkpoint")
        write(self, name, state)

    trainer, checkpoint, write = new_trainer(), RunCheckpoint(tmp_path), RunCheckpoint._write
    fit(trainer, 2, validate=lambda: {"loss": 1.0 / (1 + trainer.epoch)}, checkpoint=checkpoint)
    monkeypatch.setattr(RunCheckpoint, "_write", killed)
    checkpoint.save_best(trainer)
    checkpoint.save(trainer)
    with pytest.raises(OSError, match="killed"):
        checkpoint.wait()
    assert names(tmp_path) == ["best-1", "best-2", "step-1", "step-2"]
    RunCheckpoint(tmp_path).restore(new_trainer())
    assert names(tmp_path) == ["best-1", "step-1", "step-2"]


@pytest.fixture
def writer_may_start(monkeypatch):
    """An event that the writing of checkpoints waits for."""
    event, write = threading.Event(), RunCheckpoint._write

    def write_later(self, *arguments):
        assert event.wait(60)
        write(self, *arguments)

    monkeypatch.setattr(RunCheckpoint, "_write", write_later)
    yield event
    event.set()


@pytest.mark.parametrize("kind", [keras.optimizers.Adam, FusedAdam, FusedSGD])
def test_checkpoint_is_as_of_its_step_although_training_goes_on(tmp_path, writer_may_start, kind):
    """The values of a stopped trainer, whatever its optimizer overwrites while they are written."""

    def trained(epochs, **arguments):
        options = {} if kind is not FusedSGD else {"momentum": 0.9}
        trainer = new_trainer(new_model(dropout=0.5), optimizer=kind(0.05, **options), **arguments)
        return fit(trainer, epochs)

    trainer, checkpoint = trained(1), RunCheckpoint(tmp_path)
    checkpoint.begin()
    checkpoint.save_best(trainer)
    checkpoint.save(trainer)
    fit(trainer, 3)
    assert names(tmp_path) == []
    writer_may_start.set()
    checkpoint.wait()
    assert names(tmp_path) == ["best-1", "step-1"]
    resumed, stopped = trained(0), trained(1)
    assert checkpoint.restore(resumed)
    assert (resumed.epoch, resumed.step) == (1, 4)
    assert_same(state_of(resumed), state_of(stopped))
    assert checkpoint.restore(resumed) and not checkpoint.damaged
    assert_same(state_of(fit(resumed, 3)), state_of(trainer))


def state_of(trainer):
    variables = [*trainer.model.variables, *trainer.groups[0].optimizer.variables]
    return [variable.numpy() for variable in variables]


def test_second_checkpoint_waits_for_the_first(tmp_path, writer_may_start):
    trainer, checkpoint = new_trainer(), RunCheckpoint(tmp_path, every_s=0)
    checkpoint.begin()
    checkpoint.save(trainer)
    checkpoint.save_if_due(trainer)  # due, but does not wait
    second = threading.Thread(target=checkpoint.save, args=[trainer])
    second.start()
    second.join(0.2)
    assert second.is_alive()
    writer_may_start.set()
    second.join(60)
    checkpoint.wait()
    assert names(tmp_path) == ["step-1", "step-2"]


def test_error_of_the_writer_is_raised_by_the_next_step(tmp_path, monkeypatch):
    def full(self, name, state):
        raise OSError(f"no space left for {name}")

    class Recorder(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            steps.append(trainer.step)
            wait([checkpoint._pending] if checkpoint._pending else [])

    monkeypatch.setattr(RunCheckpoint, "_write", full)
    steps, trainer, checkpoint = [], new_trainer(), RunCheckpoint(tmp_path, every_s=0)
    with pytest.raises(OSError, match="no space left for step-1"):
        fit(trainer, 2, checkpoint=checkpoint, callbacks=[Recorder()])
    assert steps == [0, 1]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_checkpoint_is_complete_when_training_ends(tmp_path, monkeypatch, error):
    """By itself, by an error, or by an interrupt after which nothing more can be saved."""

    class Stop(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 1 and trainer.epoch == 1:
                raise error("stopped")

    def slowly(self, *arguments):
        time.sleep(0.2)
        write(self, *arguments)

    write, trainer = RunCheckpoint._write, new_trainer()
    monkeypatch.setattr(RunCheckpoint, "_write", slowly)
    with pytest.raises(error, match="stopped"):
        fit(trainer, 2, checkpoint=RunCheckpoint(tmp_path / "error"), callbacks=[Stop()])
    assert names(tmp_path / "error") == ["step-1"]
    fit(trainer, 2, checkpoint=RunCheckpoint(tmp_path / "end"))
    assert names(tmp_path / "end") == ["step-1"]


def test_full_disk_keeps_last_checkpoint(tmp_path):
    trainer, checkpoint = new_trainer(), RunCheckpoint(tmp_path)
    fit(trainer, epochs=1, checkpoint=checkpoint)
    resource = pytest.importorskip("resource", reason="limits of a process are Unix")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(
            OSError, match=r"cannot write checkpoint .*step-1 is complete: free disk space"
        ):
            checkpoint.save(trainer)
            checkpoint.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step-1"]
    assert RunCheckpoint(tmp_path).restore(new_trainer())


def test_checkpoints_are_on_the_disk_before_earlier_ones_are_deleted(tmp_path, monkeypatch):
    def deleted(self, name):
        calls.append(name)
        delete(self, name)

    calls, delete = [], RunCheckpoint._delete
    monkeypatch.setattr(files, "sync", lambda path: calls.append(path.stem))
    monkeypatch.setattr(RunCheckpoint, "_delete", deleted)
    trainer, checkpoint = new_trainer(), RunCheckpoint(tmp_path, keep=1)
    checkpoint.begin()
    for _ in range(3):  # within a second
        checkpoint.save(trainer)
    checkpoint.wait()
    assert calls == ["step-1", "step-1", tmp_path.name]
    assert names(tmp_path) == ["step-1", "step-2", "step-3"]
    checkpoint.end()
    checkpoint.end()
    assert calls[3:] == ["step-3", "step-3", tmp_path.name, "step-1", "step-2"]
    assert names(tmp_path) == ["step-3"]


def test_restored_weights_equal_saved_weights(tmp_path):
    trainer = fit(new_trainer(), 1, checkpoint=RunCheckpoint(tmp_path))
    restored = new_trainer()
    assert not np.array_equal(weights(restored.model)[0], weights(trainer.model)[0])
    RunCheckpoint(tmp_path).restore(restored)
    assert_same(weights(restored.model), weights(trainer.model))


def test_foreign_files_and_links_are_kept(tmp_path):
    directory, theirs = tmp_path / "checkpoints", tmp_path / "theirs.txt"
    directory.mkdir()
    theirs.write_text("theirs")
    kept = {".writing-plan.txt", ".saving-photos", "step-1.notes.txt", "best-0.txt"}
    (directory / ".saving-photos").mkdir()
    for name in (".writing-plan.txt", ".saving-photos/a.jpg", "step-1.notes.txt", "best-0.txt"):
        (directory / name).write_text("mine")
    # Predictable names, such as TensorFlow's, are links.
    for name in ("step-1.index", "step-1.data-00000-of-00001", ".writing-step-2.index"):
        (directory / name).symlink_to(theirs)
    trainer, checkpoint = new_trainer(), RunCheckpoint(directory)
    for epochs in (1, 2, 3):
        fit(trainer, epochs, validate=lambda: {"loss": 1.0}, checkpoint=checkpoint)
    assert theirs.read_text() == "theirs"
    assert kept <= {path.name for path in directory.iterdir()}
    assert (directory / ".saving-photos" / "a.jpg").read_text() == "mine"
    assert RunCheckpoint(directory).restore(new_trainer())

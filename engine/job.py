"""The whole job: open the data, train the student under its curriculum, evaluate, keep a record."""

import contextlib
import json
from collections.abc import Collection
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from mentorch.engine.agreement import Agreement
from mentorch.engine.assembly import assemble, collective_timeout, per_rank
from mentorch.engine.checkpoint import load_checkpoint, restore_random
from mentorch.engine.checkpoint_choice import choose_checkpoint, clean
from mentorch.engine.checkpoint_files import checkpoints
from mentorch.engine.config import RunConfig
from mentorch.engine.config_files import save_config
from mentorch.engine.data.datasets import Samples, open_datasets
from mentorch.engine.data.pipelines import Loader
from mentorch.engine.data.quarantine import Quarantine, beyond_chance
from mentorch.engine.distributed import World, distributed
from mentorch.engine.evaluate import evaluate
from mentorch.engine.failure import RunFailed
from mentorch.engine.files import replace_text
from mentorch.engine.fingerprint import check_fingerprint, fingerprint
from mentorch.engine.launch import exit_status, launch_id, launcher, run_folder
from mentorch.engine.ledger import Ledger
from mentorch.engine.messages import (
    images_gone,
    introduction,
    label_notes,
    skipped_line,
    too_many_skipped,
    train_line,
)
from mentorch.engine.parallel import share_buffers
from mentorch.engine.pictures import Pictures
from mentorch.engine.plan import dry_run
from mentorch.engine.profile import Tracer
from mentorch.engine.saving import Saver
from mentorch.engine.scores import KIND, Scores
from mentorch.engine.status import Status
from mentorch.engine.stop import StopRequest
from mentorch.engine.telemetry import Telemetry, describe_environment
from mentorch.engine.watchdog import Progress, Watchdog


class Job:
    """One run on one rank.

    Args:
        config: the run.
        world: the ranks.
        folder: the run folder.
    """

    def __init__(self, config: RunConfig, world: World, folder: Path) -> None:
        self.config, self.world, self.folder = config, world, folder
        train = config.train
        self.batch_size = per_rank(train.batch_size, world, "train.batch_size", train.accumulate)
        self.eval_batch_size = per_rank(
            train.eval_batch_size or train.batch_size, world, "train.eval_batch_size"
        )
        self.progress = Progress(train.first_step_timeout, train.step_timeout)
        self.quarantine = Quarantine(folder / "quarantine.jsonl", world.is_main)
        self._told = 0  # of this rank's unusable files, those that all ranks know of
        self._recently_skipped = 0.0
        self.datasets = open_datasets(config.data, world)
        self.loader = self._loader("train", self.datasets.train, self.batch_size)
        self.ledger = (
            Ledger(len(self.datasets.train.labels_N), world) if config.train.ledger else None
        )
        begun = world.from_main(bool(checkpoints(self.checkpoints)))
        self.spade = assemble(
            replace(config, student=replace(config.student, weights=None)) if begun else config,
            self.datasets,
            self.loader.steps_per_epoch,
            world,
            [self.ledger] if self.ledger else [],
            self.progress,
        )
        self.notes: list[str] = []  # to be said when the run introduces itself
        resumed = self._resume()
        self._make_folder(resumed)
        step, total_steps = self.spade.step_count, self.spade.total_steps
        self.telemetry = Telemetry(folder, world.is_main, step, total_steps)
        self.spade.say = self.telemetry.say
        self.pictures = Pictures(self.spade, self.ledger, self.telemetry)
        self.tracer = Tracer(config.profile, self.spade, folder, self.telemetry.say, self.progress)
        self.scores = Scores.of(world.from_main(self.telemetry.kept))
        self.go_on = f"{launcher(world)} --resume {folder}"
        self.saver = Saver(
            self.checkpoints, train.keep_checkpoints, world, before=self.telemetry.to_disk
        )
        self.status = Status(
            folder, world.is_main, total_steps=total_steps, checkpoint=step if resumed else None,
            step=step, resume=self.go_on, launch=launch_id(), world_size=world.world_size,
        )  # fmt: skip

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.folder / "checkpoints"

    def _make_folder(self, resumed: Path | None) -> None:
        if self.world.is_main:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            clean(self.checkpoints, resumed)
            save_config(self.config, self.folder / "config.json")
            environment = json.dumps(describe_environment(self.world.device), indent=2)
            replace_text(self.folder / "versions.json", environment + "\n")
        self.world.wait()

    def _loader(self, name: str, samples: Samples, batch_size: int) -> Loader:
        train = samples is self.datasets.train
        return Loader(
            samples.index,
            samples.sample_ids,
            batch_size=batch_size,
            config=self.config.data,
            train=train,
            seed=self.config.seed,
            world=self.world,
            name=name,
            refused=self.quarantine.refused(name),
            parts=self.config.train.accumulate if train else 1,
        )

    def _resume(self) -> Path | None:
        """Goes on from the run's last good checkpoint, if it has one; returns it."""
        found, notes = choose_checkpoint(self.checkpoints, self.world)
        self.notes += notes
        if found is None and self.config.resume:
            raise FileNotFoundError(f"{self.folder} has no complete checkpoint to go on from")
        if found is None:
            return None
        models, state, own, random = load_checkpoint(found, self.world.rank)
        check_fingerprint(found, state["fingerprint"], self.fingerprint)
        ranks = self.world.world_size
        if state["ranks"] != ranks:
            self.notes.append(f"begun on {state['ranks']} ranks, going on with {ranks}")
            own = {}
        self.spade.load(models, state["spade"], own)
        if self.ledger and "ledger" in models:
            self.ledger.load_state_dict(models["ledger"])
        elif self.ledger:
            self.notes.append(f"{found} has no ledger: this run's holds what is seen from here")
        restore_random(random, self.world.device)
        return found

    @cached_property
    def fingerprint(self) -> dict[str, str | int | bool]:
        """What must not change between a run and its resumption, by name. The ranks may."""
        return fingerprint(self.config, self.datasets, self.spade, self.loader)

    # ---- Training -------------------------------------------------------------------------------

    def run(self, stop: StopRequest) -> bool:
        """Trains to the end or until asked to stop; True when it reached the end."""
        self._introduce()
        spade, train = self.spade, self.config.train
        self.progress.step = spade.step_count
        self._catch_up()
        agreement = Agreement(self.world, "stop", "cannot save")
        batches = self.tracer.batches(self.loader.batches(spade.step_count, train.epochs))
        for step in self.tracer.steps(spade.train(self.progress.batches(batches, "training"))):
            self.progress.step = step
            self.telemetry.advance()
            agreed = agreement.exchange(stop.asked, self.saver.has_given_up())
            if agreed["cannot save"]:
                self.saver.fail(self.go_on)
            epoch_ends = step % spade.steps_per_epoch == 0
            if epoch_ends or step % train.log_every == 0:
                self._log(step)
            if epoch_ends:
                self._end_of_epoch(step // spade.steps_per_epoch)
            elif train.checkpoint_steps and step % train.checkpoint_steps == 0:
                self._save()
            if agreed["stop"] and step < spade.total_steps:
                agreement.finish()
                self._save()
                self._stop(stop.reason)
                return False
        agreement.finish()
        self._finish()
        return True

    def _log(self, step: int) -> None:
        """Metrics since the last time, and whether the run can go on."""
        metrics = self.spade.metrics()
        if any(self.world.gather(self.loader.unusable_count() > self._told)):
            self._note_unusable(self.loader)
            self._told = self.loader.unusable_count()
        metrics |= self.telemetry.speed(step, self.config.train.batch_size)
        self.telemetry.log(step, "train", metrics)
        if self.world.is_main:
            self.telemetry.say(train_line(step, self.spade, metrics))
        self.status.running(step, self.saver.last)
        if problem := self.saver.news():
            self.telemetry.say(problem)
        self._check_skipped(metrics["skipped"])
        self._check_storage(metrics["unusable"], metrics["rows"])

    def _check_skipped(self, skipped: float) -> None:
        """Names the samples behind steps that were skipped; too many of them end the run."""
        if not skipped:
            self._recently_skipped = 0.0
            return
        self._recently_skipped += skipped
        suspects = self.spade.suspects()
        path = self.folder / "nonfinite.jsonl"
        if self.world.is_main:
            index = self.datasets.train.index
            named = [asdict(s) | {"path": index.path(s.sample_id)} for s in suspects]
            with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in named)
            self.telemetry.say(skipped_line(skipped, named, path))
        if self._recently_skipped > self.config.train.max_skipped:
            raise RunFailed(too_many_skipped(self._recently_skipped, self.spade, path, self.go_on))

    def _check_storage(self, unusable: float, rows: float) -> None:
        """Ends a run whose images are gone, on all ranks alike.

        Without a checkpoint: steps on placeholders have spoilt the batch norms' statistics.
        """
        allowed = self.config.data.max_unusable
        if beyond_chance(unusable, rows, allowed):
            raise RunFailed(images_gone(unusable, allowed, self.quarantine, self.go_on))

    # ---- Epochs ---------------------------------------------------------------------------------

    def _end_of_epoch(self, epoch: int) -> None:
        if self.ledger:  # every epoch: in the next one other ranks may visit these samples
            self.ledger.merge()
        saved = epoch == self.config.train.epochs or epoch % self.config.train.checkpoint_every == 0
        if saved:  # first of all: whatever happens in the evaluation, the epoch is kept
            self._save()
        if self.config.train.is_evaluated(epoch):
            self._evaluate(epoch, saved, self.datasets.evaluate)
        self.pictures.end_epoch()
        self.telemetry.restart_clock()

    def _catch_up(self) -> None:
        """An evaluation that an interrupted run owes: its checkpoint is older than that."""
        step = self.spade.step_count
        epoch, within = divmod(step, self.spade.steps_per_epoch)
        if not epoch or within or not self.config.train.is_evaluated(epoch):
            return
        done = [name for name, row in self.scores.last.items() if row["step"] == step]
        if owed := [name for name in self.datasets.evaluate if name not in done]:
            self._evaluate(epoch, saved=True, names=owed)
            self.telemetry.restart_clock()
        elif self._is_best():  # the line of metrics was written before the checkpoint was marked
            self.saver.mark_best(step)

    def _evaluate(self, epoch: int, saved: bool, names: Collection[str]) -> None:
        """Evaluates on sets; the best by top-1 on the first of all is kept as a checkpoint."""
        spade = self.spade
        for name in names:
            samples = self.datasets.evaluate[name]
            loader = self._loader(name, samples, self.eval_batch_size)
            labels = torch.from_numpy(samples.labels_N).to(self.world.device)
            batches = self.progress.batches(loader.batches(), f"evaluating on {name}")
            accuracy = evaluate(
                spade.trained, batches, labels, spade.normalise, spade.dtype, self.world
            )
            self._note_unusable(loader)
            loader.close()
            row = self.telemetry.log(
                spade.step_count, f"{KIND}{name}", {"epoch": epoch, **asdict(accuracy)}
            )
            self.scores.add(row)
            self.telemetry.say(
                f"epoch {epoch}  {name}: top-1 {accuracy.top1:.4f}  top-5 {accuracy.top5:.4f}  "
                f"on {accuracy.images:,} images"
            )
        if self._is_best():
            if not saved:
                self._save()
            self.saver.mark_best(spade.step_count)

    def _is_best(self) -> bool:
        """Whether this step's top-1 on the first validation set is the best so far."""
        best = self.scores.best.get(next(iter(self.datasets.evaluate), ""))
        return best is not None and best["step"] == self.spade.step_count

    def _save(self) -> None:
        """Copies what a checkpoint holds; it is written while training goes on."""
        with self.progress.during("taking a checkpoint"):
            spade = self.spade
            share_buffers(spade.student, self.world)
            state = {
                "spade": spade.state(),
                "fingerprint": self.fingerprint,
                "ranks": self.world.world_size,
            }
            models = spade.models()
            if self.ledger:
                self.ledger.merge()
                models["ledger"] = self.ledger.state_dict()
            self.saver.save(spade.step_count, models, state, spade.own())

    def _settle(self) -> None:
        with self.progress.during("writing the last checkpoint"):
            self.saver.settle(self.go_on)

    # ---- Beginning and end ----------------------------------------------------------------------

    def _introduce(self) -> None:
        said = introduction(self.config, self.spade, self.datasets)
        for line in (*said, *label_notes(self.datasets), *self.notes, f"run folder: {self.folder}"):
            self.telemetry.say(line)
        self.status.write("running")

    def _stop(self, reason: str) -> None:
        self._settle()
        spade = self.spade
        self.telemetry.say(
            f"stopped after step {spade.step_count:,} of {spade.total_steps:,}; "
            f"go on with\n    {self.go_on}"
        )
        reason = next(filter(None, self.world.gather(reason)), "")
        self.status.write("stopped", reason, step=spade.step_count, checkpoint=self.saver.last)

    def _note_unusable(self, loader: Loader) -> None:
        """Collects what any rank had to leave out; every rank calls it."""
        for found in self.world.gather(loader.unusable()):
            self.quarantine.add(found)

    def _finish(self) -> None:
        self._note_unusable(self.loader)
        self._settle()
        if not self.world.is_main:
            return
        summary = {
            "steps": self.spade.step_count,
            "epochs": self.config.train.epochs,
            "last": self.scores.last,
            "best": self.scores.best,
            "noise": self.datasets.train.index.noise,
            "seed": self.config.seed,
            "unusable_files": len(self.quarantine.found),
        }
        replace_text(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        self.telemetry.say(self.scores.table())
        self.status.write("finished", step=self.spade.step_count, checkpoint=self.saver.last)

    def fail(self, reason: str, any_rank: bool = False) -> None:
        """Notes that the run ended of an error; where the main rank is silent, any rank does."""
        self.status.enabled |= any_rank
        self.status.write("failed", reason, step=self.progress.step)

    def close(self) -> None:
        """Stops threads and closes files."""
        self.tracer.close()
        self.loader.close()
        self.saver.close()
        self.telemetry.close()


def run(config: RunConfig) -> int:
    """Runs a job on this rank; with ``dry_run`` it only tells what that would be.

    Returns:
        The process's exit status: `exit_status`.
    """
    if config.dry_run:
        return dry_run(config)
    with distributed(config.device, collective_timeout(config.train)) as world:
        job = Job(config, world, run_folder(config, world))
        stop = StopRequest()
        at_end = partial(job.fail, any_rank=True)
        watchdog = Watchdog(job.progress, stop, world, at_end, job.folder)
        try:
            with stop.listening(), watchdog.watching():
                return exit_status(job.run(stop))
        except BaseException as error:
            job.fail(str(error) or type(error).__name__)
            raise
        finally:
            job.close()

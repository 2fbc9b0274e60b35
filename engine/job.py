"""The whole job: open the data, train the student under its curriculum, evaluate, keep a record."""

import json
import math
import time
from collections import Counter
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import torch

from mentorch.engine import checkpoint
from mentorch.engine.config import RunConfig, save_config
from mentorch.engine.criteria import create_criterion
from mentorch.engine.data.datasets import Samples, open_datasets
from mentorch.engine.data.pipelines import Loader, Normalise, digest
from mentorch.engine.data.quarantine import Quarantine
from mentorch.engine.distributed import World, distributed
from mentorch.engine.evaluate import evaluate, share_buffers
from mentorch.engine.ledger import Ledger
from mentorch.engine.messages import label_notes, launcher, train_line
from mentorch.engine.scores import Scores
from mentorch.engine.spade import Spade
from mentorch.engine.stop import StopRequest
from mentorch.engine.student import create_student
from mentorch.engine.telemetry import Telemetry, describe_environment

STOPPED = 130  # exit status of a run that was asked to stop and can be resumed


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
        self.batch_size = _per_rank(train.batch_size, world, "train.batch_size")
        self.eval_batch_size = _per_rank(
            train.eval_batch_size or train.batch_size, world, "train.eval_batch_size"
        )
        self.quarantine = Quarantine(folder / "quarantine.jsonl", world.is_main)
        self._told = 0  # of this rank's unusable files, those that all ranks know of
        self.datasets = open_datasets(config.data, world)
        self.loader = self._loader("train", self.datasets.train, self.batch_size)
        samples, classes = self.datasets.train, len(self.datasets.classes)
        labels = torch.from_numpy(samples.labels_N).to(world.device)
        clean = torch.from_numpy(samples.index.clean_labels()).to(world.device)
        steps_per_epoch = self.loader.steps_per_epoch
        torch.manual_seed(config.seed)  # line 1 of Algorithm 1: the same w⁰ on every rank
        student = create_student(config.student, classes, world.device)
        criterion = create_criterion(
            config.curriculum,
            labels_N=labels,
            clean_labels_N=clean,
            sample_ids=torch.from_numpy(samples.sample_ids).to(world.device),
            num_classes=classes,
            total_steps=steps_per_epoch * train.epochs,
            seed=config.seed,
        )
        normalise = Normalise(config.data.mean, config.data.std).to(world.device)
        self.ledger = Ledger(len(labels), world) if train.ledger else None
        observers = [self.ledger] if self.ledger else []
        self.spade = Spade(
            config, student, criterion, normalise, labels, clean, steps_per_epoch, world, observers
        )
        self.scores = Scores()
        self.notes: list[str] = []  # to be said when the run introduces itself
        if config.resume:
            self._resume()
        self._make_folder()
        self.telemetry = Telemetry(
            folder, world.is_main, self.spade.step_count, self.spade.total_steps
        )

    def _make_folder(self) -> None:
        if self.world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_config(self.config, self.folder / "config.json")
            environment = json.dumps(describe_environment(self.world.device), indent=2)
            (self.folder / "versions.json").write_text(environment + "\n")
        self.world.wait()

    def _loader(self, name: str, samples: Samples, batch_size: int) -> Loader:
        return Loader(
            samples.index,
            samples.sample_ids,
            batch_size=batch_size,
            config=self.config.data,
            train=samples is self.datasets.train,
            seed=self.config.seed,
            world=self.world,
            name=name,
            refused=self.quarantine.refused(name),
        )

    def _resume(self) -> None:
        found = checkpoint.checkpoints(self.folder / "checkpoints")
        if not found:
            raise FileNotFoundError(f"{self.folder} has no complete checkpoint to go on from")
        models, state, own = checkpoint.load_checkpoint(found[-1], self.world)
        for name, here in self.fingerprint.items():
            if state["fingerprint"].get(name, here) != here:  # an older run did not note all
                raise ValueError(
                    f"{found[-1]} was made with {name} {state['fingerprint'][name]!r}, this run "
                    f"has {here!r}: it would not go on as it was. Undo that, or start a new run"
                )
        ranks = self.world.world_size
        if state.get("ranks", ranks) != ranks:
            self.notes.append(f"begun on {state['ranks']} ranks, going on with {ranks}")
        self.spade.load(models, state["spade"], own)
        if self.ledger and "ledger" in models:
            self.ledger.load_state_dict(models["ledger"])
        elif self.ledger:
            self.notes.append(f"{found[-1]} has no ledger: this run's holds what is seen from here")
        self.scores = Scores(**state["scores"])

    @cached_property
    def fingerprint(self) -> dict[str, str | int | bool]:
        """What must not change between a run and its resumption, by name. The ranks may."""
        config = self.config
        return {
            "seed": config.seed,
            "train.batch_size": config.train.batch_size,
            "student.name": config.student.name,
            "classes": len(self.datasets.classes),
            "precision": str(self.spade.dtype),
            "an average of the weights": self.spade.average is not None,
            **self.loader.fingerprint(),
            "training labels": digest(self.datasets.train.labels_N),
        }

    def run(self, stop: StopRequest) -> bool:
        """Trains to the end or until asked to stop; True when it reached the end."""
        self._introduce()
        spade, train = self.spade, self.config.train
        batches = self.loader.batches(spade.step_count, train.epochs)
        for step in spade.train(batches):
            self.telemetry.advance()
            asked = stop.asked
            stopping = asked and self.world.world_size == 1
            epoch_ends = step % spade.steps_per_epoch == 0
            if epoch_ends or step % train.log_every == 0 or stopping:
                stopping = self._log(step, asked)
            if epoch_ends:
                self._end_of_epoch(step // spade.steps_per_epoch)
            elif train.checkpoint_steps and step % train.checkpoint_steps == 0 and not stopping:
                self._save()
            if stopping and step < spade.total_steps:
                self._save()
                self._say_how_to_resume()
                return False
        self._summarize()
        return True

    def _log(self, step: int, stop_asked: bool) -> bool:
        """Metrics since the last time; True when any rank was asked to stop."""
        unusable = self.loader.unusable_count()
        metrics, (stopping, news) = self.spade.metrics(stop_asked, unusable > self._told)
        if news:
            self._note_unusable(self.loader)
            self._told = unusable
        metrics |= self.telemetry.speed(step, self.config.train.batch_size)
        self.telemetry.log(step, "train", metrics)
        if self.world.is_main:
            self.telemetry.say(train_line(step, self.spade, metrics))
        self._check_storage(metrics["unusable"], metrics["rows"])
        return stopping

    def _check_storage(self, unusable: float, rows: float) -> None:
        """Ends a run whose images are gone, on all ranks alike.

        Without a checkpoint: steps on placeholders have spoilt the batch norms' statistics.
        """
        allowed = self.config.data.max_unusable
        # Few rows (a line after one step) may hold more by chance: four standard deviations.
        chance = 4 * math.sqrt(allowed * (1 - allowed) / max(rows, 1))
        if unusable > allowed + chance:
            reasons = Counter(u.reason for u in self.quarantine.found.values())
            raise RuntimeError(
                f"{unusable:.0%} of the images since the last line of metrics could not be used "
                f"(data.max_unusable is {allowed:.0%}), most of them because of: "
                f"{reasons.most_common(1)[0][0]}. {self.quarantine.path} names them. Mend that and "
                f"go on from the last checkpoint with\n"
                f"    {launcher(self.world)} --resume {self.folder}"
            )

    def _end_of_epoch(self, epoch: int) -> None:
        train = self.config.train
        if self.ledger:  # every epoch: in the next one other ranks may visit these samples
            self.ledger.merge()
        last = epoch == train.epochs
        due = last or epoch % train.checkpoint_every == 0
        if due:  # first of all: whatever happens in the evaluation, the epoch is kept
            self._save()
        if last or epoch % train.evaluate_every == 0:
            best = self._evaluate(epoch)
            if due or best:
                self._save(best)
        self.telemetry.restart_clock()

    def _evaluate(self, epoch: int) -> bool:
        """Evaluates on every set; True when the first set's top-1 is the best so far."""
        spade, best = self.spade, []
        for name, samples in self.datasets.evaluate.items():
            loader = self._loader(name, samples, self.eval_batch_size)
            labels = torch.from_numpy(samples.labels_N).to(self.world.device)
            accuracy = evaluate(
                spade.trained, loader, labels, spade.normalise, spade.dtype, self.world
            )
            self._note_unusable(loader)
            loader.close()
            best.append(self.scores.add(name, accuracy, epoch))
            self.telemetry.log(spade.step_count, f"eval/{name}", asdict(accuracy))
            self.telemetry.say(
                f"epoch {epoch}  {name}: top-1 {accuracy.top1:.4f}  top-5 {accuracy.top5:.4f}  "
                f"on {accuracy.images:,} images"
            )
        return bool(best) and best[0]

    def _save(self, best: bool = False) -> None:
        folder, spade = self.folder / "checkpoints", self.spade
        share_buffers(spade.student, self.world)
        if best:
            self.scores.best_checkpoint = f"step-{spade.step_count:08d}"
        state = {
            "spade": spade.state(),
            "scores": asdict(self.scores),
            "fingerprint": self.fingerprint,
            "ranks": self.world.world_size,
        }
        models, own = spade.models(), {"loss_moving_avg": spade.criterion.loss_moving_avg}
        if self.ledger:
            self.ledger.merge()
            models["ledger"] = self.ledger.state_dict()
        checkpoint.save_checkpoint(folder, spade.step_count, models, state, own, self.world)
        if self.world.is_main:
            keep = self.config.train.keep_checkpoints
            checkpoint.prune(folder, keep, self.scores.best_checkpoint)

    def _introduce(self) -> None:
        say, data, spade = self.telemetry.say, self.datasets, self.spade
        count = sum(p.numel() for p in spade.student.parameters())
        say(
            f"{self.config.student.name} ({count / 1e6:.1f} M parameters, {len(data.classes)} "
            f"classes, {spade.dtype}) under curriculum {self.config.curriculum.name!r}, on "
            f"{self.world.world_size} × {self.world.device.type}"
        )
        say(
            f"{len(data.train.sample_ids):,} training samples, {spade.steps_per_epoch:,} steps an "
            f"epoch, {spade.total_steps:,} in all; {spade.step_count:,} taken"
        )
        for line in (*label_notes(data), *self.notes):
            say(line)
        say(f"run folder: {self.folder}")

    def _say_how_to_resume(self) -> None:
        self.telemetry.say(
            f"stopped after step {self.spade.step_count:,} of {self.spade.total_steps:,}; "
            f"go on with\n    {launcher(self.world)} --resume {self.folder}"
        )

    def _note_unusable(self, loader: Loader) -> None:
        """Collects what any rank had to leave out; every rank calls it."""
        for found in self.world.gather(loader.unusable()):
            self.quarantine.add(found)

    def _summarize(self) -> None:
        self._note_unusable(self.loader)
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
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        self.telemetry.say(self.scores.table())

    def close(self) -> None:
        """Stops threads and closes files."""
        self.loader.close()
        self.telemetry.close()


def _per_rank(batch_size: int, world: World, name: str) -> int:
    if batch_size % world.world_size:
        raise ValueError(
            f"{name} is {batch_size}, which {world.world_size} ranks cannot share out evenly"
        )
    return batch_size // world.world_size


def _run_folder(config: RunConfig, world: World) -> Path:
    if config.resume:
        return config.resume
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return Path(world.from_main(str(config.out / f"{config.name}-{stamp}")))


def run(config: RunConfig) -> int:
    """Runs a job on this rank.

    Returns:
        The process's exit status: 0 at the end of training, 130 when stopped and resumable.
    """
    with distributed(config.device) as world:
        job = Job(config, world, _run_folder(config, world))
        try:
            with StopRequest().listening() as stop:
                return 0 if job.run(stop) else STOPPED
        finally:
            job.close()

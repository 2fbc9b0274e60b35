"""MentorNet (Fig. 1) as a module, and its file format.

The mathematics is `mentorch.kernels.mentor.mentornet_ref`; this module owns the parameters, so that
they can be learned (`mentorch.engine.mentor_training`) and saved.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mentorch.kernels.mentor import EPOCHS, LstmWeights, MentorWeights, mentornet_ref

_FORMAT = "mentornet-1"


class _Lstm(nn.Module):
    """The parameters of one direction, with torch's initialisation."""

    def __init__(self, units: int) -> None:
        super().__init__()
        for name, shape in (("weight_ih", (2,)), ("weight_hh", (units,)), ("bias", ())):
            bound = units**-0.5
            self.register_parameter(
                name, nn.Parameter(torch.empty(4 * units, *shape).uniform_(-bound, bound))
            )

    def forward(self) -> LstmWeights:
        return LstmWeights(
            self.get_parameter("weight_ih"),
            self.get_parameter("weight_hh"),
            self.get_parameter("bias"),
        )


class MentorNet(nn.Module):
    """g_m(z; Θ): sample weights from loss, loss difference, label and epoch percentage.

    The default dims are the released code's (9 → 20 → 1).

    Args:
        num_labels: rows of the label embedding.
        label_dim: its width.
        epoch_dim: width of the epoch embedding, whose rows are the 100 epoch percentages.
        lstm_units: hidden units a direction.
        fc_units: units of fc1 (tanh).
        use_label: read the label. Off by default: a curriculum with labels fits one label set only.
        lstm_output: pass on the hidden state ``"h"``, or the cell state ``"c"`` as released.
        card: what it was learnt from and how well it fits, saved along; JSON values.

    Raises:
        ValueError: unknown ``lstm_output``.
    """

    def __init__(
        self,
        *,
        num_labels: int = 2,
        label_dim: int = 2,
        epoch_dim: int = 5,
        lstm_units: int = 1,
        fc_units: int = 20,
        use_label: bool = False,
        lstm_output: str = "h",
        card: dict[str, object] | None = None,
    ) -> None:
        super().__init__()
        if lstm_output not in ("h", "c"):
            raise ValueError(f"lstm_output must be 'h' or 'c', got {lstm_output!r}")
        self.use_label = use_label
        self.lstm_output = lstm_output
        self.card = card or {}
        self.label_embedding = nn.Parameter(torch.randn(num_labels, label_dim))
        self.epoch_embedding = nn.Parameter(torch.randn(EPOCHS, epoch_dim))
        self.forward_lstm = _Lstm(lstm_units)
        self.backward_lstm = _Lstm(lstm_units)
        self.fc1 = nn.Linear(label_dim + epoch_dim + 2 * lstm_units, fc_units)
        self.fc2 = nn.Linear(fc_units, 1)

    def weights(self) -> MentorWeights:
        """Θ as the kernels take it (no copies)."""
        return MentorWeights(
            self.label_embedding,
            self.epoch_embedding,
            self.forward_lstm(),
            self.backward_lstm(),
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            self.use_label,
            self.lstm_output,
        )

    def forward(self, loss: Tensor, loss_diff: Tensor, labels: Tensor, epoch_pct: Tensor) -> Tensor:
        """Weights [B]; arguments as `mentornet_ref`."""
        return mentornet_ref(self.weights(), loss, loss_diff, labels, epoch_pct)

    def save(self, path: str | Path) -> None:
        """Writes Θ, the two options and the card to a safetensors file."""
        options = {
            "format": _FORMAT,
            "use_label": json.dumps(self.use_label),
            "lstm_output": self.lstm_output,
            "card": json.dumps(self.card, sort_keys=True),
        }
        tensors = {name: p.detach().cpu().contiguous() for name, p in self.named_parameters()}
        # Not save_file: its files are readable by their owner only, whatever the umask.
        Path(path).write_bytes(save(tensors, options))

    @classmethod
    def load(cls, path: str | Path) -> "MentorNet":
        """Reads a file written by `save`; dims come from the tensors.

        Raises:
            ValueError: not a readable MentorNet file.
            FileNotFoundError: no such file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no MentorNet file at {path}")
        try:
            with safe_open(path, "pt") as file:
                options = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
        if options.get("format") != _FORMAT:
            found = options.get("format", "none")
            raise ValueError(f"{path} is not a MentorNet: format {found!r}, not {_FORMAT!r}")
        try:
            return cls._from_file(state, options)
        except (KeyError, IndexError, RuntimeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a complete MentorNet: {error}") from error

    @classmethod
    def _from_file(cls, state: dict[str, Tensor], options: dict[str, str]) -> "MentorNet":
        mentor = cls(
            num_labels=state["label_embedding"].shape[0],
            label_dim=state["label_embedding"].shape[1],
            epoch_dim=state["epoch_embedding"].shape[1],
            lstm_units=state["forward_lstm.weight_hh"].shape[1],
            fc_units=state["fc1.bias"].shape[0],
            use_label=json.loads(options["use_label"]),
            lstm_output=options["lstm_output"],
            card=json.loads(options["card"]),
        )
        mentor.load_state_dict(state)
        return mentor

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

    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor

    def __init__(self, units: int) -> None:
        super().__init__()
        for name, shape in (("weight_ih", (2,)), ("weight_hh", (units,)), ("bias", ())):
            bound = units**-0.5
            start = torch.empty(4 * units, *shape, dtype=torch.float32)
            self.register_parameter(name, nn.Parameter(start.uniform_(-bound, bound)))

    def forward(self) -> LstmWeights:
        # Attributes: FSDP puts plain tensors, views of its own, in the place of parameters.
        return LstmWeights(self.weight_ih, self.weight_hh, self.bias)


def _check_options(lstm_output: str, encoder: str, activation: str, history_steps: int) -> None:
    if lstm_output not in ("h", "c"):
        raise ValueError(f"lstm_output must be 'h' or 'c', got {lstm_output!r}")
    if encoder not in ("lstm", "none"):
        raise ValueError(f"encoder must be 'lstm' or 'none', got {encoder!r}")
    if activation not in ("tanh", "linear"):
        raise ValueError(f"activation must be 'tanh' or 'linear', got {activation!r}")
    if history_steps < 1:
        raise ValueError(f"history_steps must be at least 1, got {history_steps}")


class MentorNet(nn.Module):
    """g_m(z; Θ): sample weights from loss, loss difference, label and epoch percentage.

    The default dims are the released code's (9 → 20 → 1).

    Args:
        num_labels: rows of the label embedding.
        label_dim: its width.
        epoch_dim: width of the epoch embedding, whose rows are the 100 epoch percentages.
        lstm_units: hidden units a direction.
        fc_units: units of fc1.
        use_label: read the label. Off by default: a curriculum with labels fits one label set only.
        lstm_output: pass on the hidden state ``"h"``, or the cell state ``"c"`` as released.
        encoder: of a sample's last T visits: ``"lstm"``, or ``"none"``, which gives fc1 the T pairs
            of loss and difference as they are (the two-layer perceptron of Appendix D).
        activation: of fc1, ``"tanh"`` or ``"linear"``. A linear fc1 of one unit without an LSTM
            makes it a logistic regression.
        history_steps: T, for ``encoder="none"`` only; an LSTM takes any T.
        card: what it was learnt from and how well it fits, saved along; JSON values.

    Raises:
        ValueError: unknown ``lstm_output``, ``encoder`` or ``activation``, or no step.
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
        encoder: str = "lstm",
        activation: str = "tanh",
        history_steps: int = 1,
        card: dict[str, object] | None = None,
    ) -> None:
        super().__init__()
        _check_options(lstm_output, encoder, activation, history_steps)
        self.use_label = use_label
        self.lstm_output = lstm_output
        self.encoder = encoder
        self.activation = activation
        self.card = card or {}
        exact = torch.float32  # whatever PyTorch's default dtype is
        self.label_embedding = nn.Parameter(torch.randn(num_labels, label_dim, dtype=exact))
        self.epoch_embedding = nn.Parameter(torch.randn(EPOCHS, epoch_dim, dtype=exact))
        has_lstm = encoder == "lstm"
        self.forward_lstm = _Lstm(lstm_units) if has_lstm else None
        self.backward_lstm = _Lstm(lstm_units) if has_lstm else None
        of_visits = 2 * lstm_units if has_lstm else 2 * history_steps
        self.fc1 = nn.Linear(label_dim + epoch_dim + of_visits, fc_units, dtype=exact)
        self.fc2 = nn.Linear(fc_units, 1, dtype=exact)

    def weights(self) -> MentorWeights:
        """Θ as the kernels take it (no copies)."""
        return MentorWeights(
            self.label_embedding,
            self.epoch_embedding,
            self.forward_lstm() if self.forward_lstm is not None else None,
            self.backward_lstm() if self.backward_lstm is not None else None,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            self.use_label,
            self.lstm_output,
            self.encoder,
            self.activation,
        )

    def forward(self, loss: Tensor, loss_diff: Tensor, labels: Tensor, epoch_pct: Tensor) -> Tensor:
        """Weights [B]; arguments as `mentornet_ref`."""
        return mentornet_ref(self.weights(), loss, loss_diff, labels, epoch_pct)

    def save(self, path: str | Path) -> None:
        """Writes Θ, the options and the card to a safetensors file."""
        options = {
            "format": _FORMAT,
            "use_label": json.dumps(self.use_label),
            "lstm_output": self.lstm_output,
            "encoder": self.encoder,
            "activation": self.activation,
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
        except (KeyError, IndexError, RuntimeError, ValueError) as error:  # JSON's is a ValueError
            raise ValueError(f"{path} is not a complete MentorNet: {error}") from error

    @classmethod
    def _from_file(cls, state: dict[str, Tensor], options: dict[str, str]) -> "MentorNet":
        encoder = options.get("encoder", "lstm")  # older files have no other
        label_dim, epoch_dim = (state[f"{n}_embedding"].shape[1] for n in ("label", "epoch"))
        of_visits = state["fc1.weight"].shape[1] - label_dim - epoch_dim
        mentor = cls(
            num_labels=state["label_embedding"].shape[0],
            label_dim=label_dim,
            epoch_dim=epoch_dim,
            lstm_units=state["forward_lstm.weight_hh"].shape[1] if encoder == "lstm" else 0,
            fc_units=state["fc1.bias"].shape[0],
            use_label=json.loads(options["use_label"]),
            lstm_output=options["lstm_output"],
            encoder=encoder,
            activation=options.get("activation", "tanh"),
            history_steps=of_visits // 2 if encoder == "none" else 1,
            card=json.loads(options["card"]),
        )
        mentor.load_state_dict(state)
        return mentor

"""A callback for the Trainer of transformers: commits with its optimizer, metrics to its loggers."""

from collections.abc import Collection
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from kmeans_route.training.attach import Attachment, attach
from kmeans_route.training.telemetry import MAX_KEYS

DEFAULT_METRICS = ("maxvio", "dead_experts", "bias_abs_max", "centroid_drift")


class KMeansRouterCallback(TrainerCallback):
    """Attaches the routers of the model as training begins: one commit per optimizer step of the Trainer.

    Args:
        metrics: which metrics of the routers go into the logs, beside the loss; None for all.
        max_keys: at most that many scalars, see `Attachment.metrics`; None for no limit.
        attach_options: of `kmeans_route.attach`.

    The checkpoints that the Trainer writes meanwhile have the names of the model's own state dict: in the form that
    `save_pretrained` writes by default, experts one by one, Trainer's own resume finds none of them (5.23) and goes on
    with the weights that it has, with a mere warning. `from_pretrained` and `load_kmeans_pretrained` read both forms.

    Callbacks are asked in order, and Trainer(callbacks=[...]) puts its own after the loggers that report_to names:
    those would miss the metrics, which `add_to` puts in before any of them.

    Example:
        callback = KMeansRouterCallback().add_to(trainer)
        trainer.train()
    """

    def __init__(
        self, metrics: Collection[str] | None = DEFAULT_METRICS, max_keys: int | None = MAX_KEYS, **attach_options: Any
    ) -> None:
        if isinstance(metrics, str) or not isinstance(metrics, Collection | None):
            raise TypeError(
                f"metrics must be a list of names or None, got {type(metrics).__name__}: the callback takes no model, "
                "it finds the Trainer's"
            )
        self.metrics, self.max_keys, self.attach_options = metrics, max_keys, attach_options
        self.attachment: Attachment | None = None
        self._saved_form: tuple[PreTrainedModel, Any] | None = None

    def add_to(self, trainer: Any) -> "KMeansRouterCallback":
        """Put this callback before all others of a Trainer, so that every logger gets the metrics.

        Raises:
            TypeError: no Trainer of transformers.
        """
        if not hasattr(trainer, "callback_handler"):
            raise TypeError(f"trainer must be a Trainer, got {type(trainer).__name__}: make the Trainer first")
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **at_hand: Any) -> None:
        """Attach to the optimizer itself, which accelerate wraps."""
        self._detach()  # of a training that was interrupted
        optimizer = at_hand["optimizer"]
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        self.attachment = attach(at_hand["model"], optimizer, **self.attach_options)
        self.attachment.load_state_dict({**self.attachment.state_dict(), "steps": state.global_step})
        inner = next(module for module in at_hand["model"].modules() if isinstance(module, PreTrainedModel))
        self._saved_form = (inner, getattr(inner, "_weight_conversions", None))
        inner._weight_conversions = []

    def on_train_end(self, _args: Any, _state: Any, _control: Any, **_at_hand: Any) -> None:
        """Detach; the routers keep their state."""
        self._detach()

    def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_at_hand: Any) -> None:
        """Add the metrics where the loss of training is logged, in the Trainer's own history too."""
        if self.attachment is None or not logs or "loss" not in logs:
            return
        values = self.attachment.metrics(self.metrics, self.max_keys)
        logs.update(values)
        state.log_history[-1].update(values)

    def _detach(self) -> None:
        if self.attachment is not None:
            self.attachment.remove()
            self.attachment = None
        if self._saved_form is not None:
            self._saved_form[0]._weight_conversions = self._saved_form[1]
            self._saved_form = None

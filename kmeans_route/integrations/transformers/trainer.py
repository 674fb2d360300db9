"""A callback for the Trainer of transformers: commits with its optimizer, metrics to its loggers."""

import weakref
from collections.abc import Collection
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from kmeans_route.training.attach import Attachment, attach
from kmeans_route.training.telemetry import MAX_KEYS

DEFAULT_METRICS = ("maxvio", "dead_experts", "bias_abs_max", "centroid_drift")


class StateDictNames(list[Any]):
    """The `_weight_conversions` of a model in training: none, so that its checkpoints have its state dict's names.

    It lies on the model and knows what was there before, for an interrupted Trainer asks its callbacks nothing more:
    whoever trains the model next ends what that training has left. A copy of the model gets what was there before.
    """

    def __init__(self, model: PreTrainedModel, attachment: Attachment, state: Any) -> None:
        super().__init__()
        self.before = getattr(model, "_weight_conversions", None)
        self.model, self.attachment, self.state, self.taken_over = weakref.ref(model), attachment, state, False
        model._weight_conversions = self

    def __reduce__(self) -> Any:
        return _itself, (self.before,)

    def end(self) -> None:
        """Put back what was there before, unless something else lies there by now, and detach."""
        model = self.model()
        if getattr(model, "_weight_conversions", None) is self:
            model._weight_conversions = self.before  # type: ignore[union-attr]
        self.attachment.remove()


def _itself(before: Any) -> Any:
    return before


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
        self._names: StateDictNames | None = None

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
        inner = next(module for module in at_hand["model"].modules() if isinstance(module, PreTrainedModel))
        left = getattr(inner, "_weight_conversions", None)
        if isinstance(left, StateDictNames) and left.state is not state:  # not of another callback of this training
            left.taken_over = True
            left.end()
        self.attachment = attach(at_hand["model"], optimizer, **self.attach_options)
        self.attachment.load_state_dict({**self.attachment.state_dict(), "steps": state.global_step})
        self._names = StateDictNames(inner, self.attachment, state)

    def on_step_begin(self, _args: Any, _state: Any, _control: Any, **_at_hand: Any) -> None:
        """Refuse to go on where another training has taken the model for one that was over."""
        if self._names is not None and self._names.taken_over:
            raise RuntimeError(
                "model must be in one training at a time, got another Trainer's that began before this one had ended, "
                "so that the routers are no longer attached here: train one after the other, or copies of the model"
            )

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
        if self._names is not None:
            self._names.end()
        self.attachment = self._names = None

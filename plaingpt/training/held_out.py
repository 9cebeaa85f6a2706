"""What a run measures on its way: its loss on held-out text, and its tasks."""

from plaingpt.evaluation.loss import bits_per_byte, validation_loss
from plaingpt.runtime import Runtime
from plaingpt.training.data import Data
from plaingpt.training.log import Record
from plaingpt.training.plan import Plan
from plaingpt.training.state import TrainState
from plaingpt.training.tasks import measure_tasks


def evaluate(state: TrainState, plan: Plan, data: Data, rt: Runtime) -> Record:
    """Print and return what is due after this step: `val_loss` and, if known, `val_bpb`, and the
    figures of the tasks. Before the first step, a signal ends it: {}."""
    measured: Record = {}
    if plan.evaluation.due(state.step):
        micro, split, first = plan.micro_batch_size, data.held_out, state.step == 0
        loss, counted = validation_loss(state.fast_model, split, data.eval_tokens, micro, rt, first)
        if first and not counted:
            return {}
        state.count_evaluation(loss)
        measured["val_loss"] = loss
        text = f"step {state.step}: validation loss {loss:.4f} nats per token"
        if bytes_per_token := data.dataset.bytes_per_token(split):
            measured["val_bpb"] = bits_per_byte(loss, bytes_per_token)
            text += f", {measured['val_bpb']:.4f} bits per byte"
        print(text)
    last = plan.finished(state.step, state.progress.waited)  # because of its patience, maybe
    if last or plan.measuring.due(state.step):
        measured |= measure_tasks(state.model, data.tasks, state.step, rt)
    return measured

"""Settings of a run of `t2l train task-loras`. Knows plain values only."""

from dataclasses import dataclass, field

from t2l.config import Count, LoraConfig, NotNegative, Positive, PromptConfig, Seed, Share, check_ranges
from t2l.errors import ConfigError
from t2l.train.metrics import ReportTo
from t2l.train.processes import Sharding


@dataclass(frozen=True, kw_only=True)
class TaskLorasDataConfig:
    """Which tasks get an adapter."""

    tasks: tuple[str, ...] = ("sni-paper",)
    """Where tasks come from. `sni`: the frozen split's training tasks; `sni-paper`: those of them that are the paper's;
    `sni-validation` and `sni-test` for evaluation only; `benchmarks`: the paper's benchmarks that have training data.
    Anything else names own tasks as `t2l.tasks.load_own` reads them: a JSONL file, a folder of them, or `hf:NAME`."""
    only: tuple[str, ...] = ()
    """Names of the tasks of these sources that are trained; empty means all."""
    validation_examples: Count = 60
    """Training examples kept for early stopping where a task has no examples of split `val`; at most a fifth of the
    task's examples are kept."""

    def __post_init__(self) -> None:
        check_ranges(self, "data")


@dataclass(frozen=True, kw_only=True)
class TaskLorasTrainConfig:
    """How each adapter is trained."""

    max_steps: Count = 400
    """Most steps of one adapter, and the length of its learning rate's schedule."""
    tasks_per_batch: Count = 64
    """K, the number of tasks that are trained at once, over all processes."""
    rows_per_task: Count = 1
    """Rows of a batch that belong to one task."""
    max_seq_length: Count = 384
    """Tokens of a row, which holds as many examples of its task as fit."""
    max_target_length: Count = 128
    """Answer tokens of a row, over all of its examples."""
    learning_rate: NotNegative = 1e-3
    warmup_ratio: Share = 0.1
    """Share of the steps over which the learning rate rises; it then falls linearly to zero."""
    weight_decay: NotNegative = 0.01
    max_grad_norm: Positive = 1.0
    """For each adapter on its own."""
    eval_steps: Count = 25
    """Steps between two evaluations of an adapter on its own validation examples."""
    eval_rows: Count = 8
    """Most rows of validation examples that an evaluation of one task looks at."""
    early_stopping_patience: Count = 4
    """Evaluations in a row without a lower validation loss after which an adapter is done; its best weights are
    kept."""
    shared_init: bool = True
    """Whether all adapters start from the same A, which keeps them close to one another and easy to reconstruct."""
    init_from: str | None = None
    """Checkpoint of a multi-task LoRA (variant `none`) that all adapters start from. What the tasks have in common is
    then alike in all adapters, and a hypernetwork that reconstructs them need not learn it."""
    freeze_a: bool = False
    """Whether all adapters keep the A that they start from and differ in B alone, as in LoRA-FA (arXiv 2308.03303)."""
    torch_compile: bool = False
    """Compile the step: a minute at the start, then much faster on a GPU."""
    save_steps: Count = 200
    """Steps between two saved states; a state is saved after an evaluation."""
    fsdp: Sharding = "off"
    """Shard the frozen base over the processes (FSDP2), for a base that no device holds whole."""
    ddp_timeout: Count = 600
    """Seconds after which a process that does not answer the others ends the run."""
    report_to: ReportTo = "tensorboard"
    """Where numbers are shown beside `metrics.jsonl`, which is always written."""

    def __post_init__(self) -> None:
        check_ranges(self, "train")
        if self.max_steps % self.eval_steps:
            raise ConfigError(
                f"train.max_steps ({self.max_steps}) must be a multiple of train.eval_steps ({self.eval_steps})"
            )
        if self.freeze_a and not (self.shared_init or self.init_from):
            raise ConfigError(
                "train.freeze_a is for adapters that have one A, but with train.shared_init false each has its own; "
                "share it, or name a checkpoint in train.init_from"
            )


@dataclass(frozen=True, kw_only=True)
class TaskLorasConfig:
    """One run of `t2l train task-loras`."""

    base: str
    """Model reference of the base."""
    seed: Seed = 0
    lora: LoraConfig = field(default_factory=LoraConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """Whether the description stands in the prompts that the adapters are trained on."""
    data: TaskLorasDataConfig = field(default_factory=TaskLorasDataConfig)
    train: TaskLorasTrainConfig = field(default_factory=TaskLorasTrainConfig)
    for_evaluation_only: bool = False
    """Whether tasks are trained too that no hypernetwork may see, to have an upper bound in a table. The library says
    so, and reconstruction refuses it."""

    def __post_init__(self) -> None:
        check_ranges(self)

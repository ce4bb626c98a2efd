"""Settings of a run of `t2l train sft`, and which of them go together. Knows plain values only."""

from dataclasses import dataclass, field
from typing import Literal

from t2l.config import (
    Count,
    EncoderConfig,
    HypernetConfig,
    LoraConfig,
    NaturalNumber,
    NotNegative,
    Positive,
    PromptConfig,
    Seed,
    Share,
    check_ranges,
)
from t2l.errors import ConfigError
from t2l.train.metrics import ReportTo
from t2l.train.processes import Sharding

KINDS_OF_DESCRIPTIONS = ("own", "definitions", "paraphrases", "random")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The tasks that are trained on, their descriptions, and how often their rows are augmented."""

    tasks: str = "sni"
    """`sni`: the frozen split's training tasks without the held-back ones, from `T2L_DATA`. Otherwise own tasks as
    `t2l.tasks.load_own` reads them: a JSONL file, a folder of such files, or `hf:NAME`."""
    extra_tasks: tuple[str, ...] = ()
    """Further sources of training tasks: `t0` for the packed T0 tasks from `T2L_DATA`, `computed` for the rules of
    `t2l.train.computed`, or own tasks as for `tasks`."""
    extra_weights: tuple[float, ...] = ()
    """For each of them the share of rows that it gets; `tasks` has the rest. Without weights all tasks come alike."""
    descriptions: str = "own"
    """`own`: the descriptions that come with the tasks. `definitions`: only their full definition; `paraphrases`: all
    descriptions but the definition; both of these leave out tasks that do not have the two kinds, so that they train
    on the same tasks. `random`: one fixed text of random words for each task. Otherwise a file as
    `t2l.tasks.load_descriptions` reads it, whose descriptions come on top of the tasks' own: one of them is drawn for
    every second row of a task that has both."""
    label_remap_prob: Share = 0.0
    """Share of the rows of a task with a few short answers in which other words stand for these answers, as the row's
    description says; see `t2l.train.augment.LabelRemap`."""
    format_variation_prob: Share = 0.0
    """Share of the rows of a task with open answers in which the answers have another form, as the row's description
    says; see `t2l.train.augment.FormatVariation`."""
    auxiliary_task_prob: Share = 0.0
    """Share of a task's rows that ask something else about its examples, such as whether an answer is right; see
    `t2l.train.augment.AnswerCheck` and `AnswerChoice`. The other rows may still be remapped or reformatted."""
    random_description_prob: Share = 0.0
    """Share of rows whose adapter is written from random words while prompt and answers stay as they are, so that a
    text which describes nothing does no harm."""
    terse_description_prob: Share = 0.0
    """Share of rows whose description, in adapter and prompt, is a text that says next to nothing of the task, such as
    the name of its category, so that the adapter then does what the shared LoRA does."""
    option_placement_prob: Share = 0.0
    """Share of the rows of a task with a few short answers whose inputs list these as options, in random order and in
    many forms. Above 0, some auxiliary tasks also list answers in the input and are answered in their words."""
    held_out_descriptions: NaturalNumber = 4
    """Descriptions of each task that are kept for evaluation, where the task has enough of them."""
    held_out_tasks: NaturalNumber = 0
    """Training tasks that are taken out and evaluated with the validation tasks, spread evenly over categories."""
    max_tasks: Count | None = None
    """Train on a random subset of so many tasks; a larger subset holds all of a smaller one. Null means all tasks."""

    def __post_init__(self) -> None:
        check_ranges(self, "data")
        if len(set(self.extra_tasks)) < len(self.extra_tasks) or "" in self.extra_tasks:
            raise ConfigError(f"data.extra_tasks must be different sources, got {list(self.extra_tasks)}")
        if self.extra_weights and len(self.extra_weights) != len(self.extra_tasks):
            raise ConfigError(
                f"data.extra_weights has {len(self.extra_weights)} shares for {len(self.extra_tasks)} sources in "
                "data.extra_tasks; give each source one"
            )
        if self.extra_weights and (min(self.extra_weights) <= 0 or sum(self.extra_weights) >= 1):
            raise ConfigError(
                f"data.extra_weights must be above 0 and add up to less than 1, got {list(self.extra_weights)}"
            )

    @property
    def source_weights(self) -> tuple[float, ...]:
        """The share of rows that each source gets, that of `tasks` first; none where all tasks come alike."""
        return (1 - sum(self.extra_weights), *self.extra_weights) if self.extra_weights else ()

    @property
    def augmented(self) -> list[str]:
        """The augmentations in use, which say in a row's description what its answers are."""
        names = ("label_remap_prob", "format_variation_prob", "auxiliary_task_prob")
        return [f"data.{name}" for name in names if getattr(self, name)]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a run is trained, and when it is evaluated, saved and stopped."""

    max_steps: Count
    tasks_per_batch: Count = 8
    """Rows of a batch, over all processes; each row belongs to one task. `--dry-run` says how many a device has room
    for."""
    gradient_accumulation_steps: Count = 1
    """Parts that a process's share of a batch is computed in, one after another: less memory, the same gradient."""
    max_seq_length: NaturalNumber = 0
    """Tokens of a row, which holds as many examples of its task as fit; 0 for as many as the longest example of the
    tasks takes, 384 at most."""
    max_target_length: NaturalNumber = 0
    """Answer tokens of a row, over all of its examples; 0 for what the longest answer takes, a quarter of the row at
    least."""
    description_in_prompt_prob: Share = 0.5
    """Share of rows whose prompt also holds the description. Between 0 and 1 the checkpoint serves both ways."""
    learning_rate: NotNegative = 5e-4
    shared_lora_learning_rate: NotNegative = 5e-4
    """Learning rate of the LoRA that every adapter starts from."""
    warmup_ratio: Share = 0.05
    """Share of the steps over which the learning rate rises; it then falls linearly to zero."""
    weight_decay: NotNegative = 0.01
    max_grad_norm: Positive = 1.0
    margin_loss_weight: NotNegative = 0.0
    """Weight of a hinge loss on the steering margin: with another task's description and the same prompt, the answers
    should cost one nat a token more than with the right one. An eighth of a batch's rows is compared, each of which is
    computed twice. Rows whose prompt shows the description are left out, because there another text need not do
    harm."""
    l2_weight: NotNegative = 0.0
    """Weight of the mean square of the written A plus that of B (the reference implementation: 1e-3)."""
    label_smoothing_factor: Share = 0.0
    """Share of the target that is spread over the whole vocabulary (the reference implementation: 0.1)."""
    neftune_noise_alpha: NotNegative = 0.0
    """Uniform noise on the base's input embeddings, at most alpha / sqrt(T·E) in each of the E numbers of each of a
    document's T tokens (arXiv 2310.05914, where it is 5). T counts one document's tokens, not those of a packed row."""
    init_from: str | None = None
    """Checkpoint to start from: of a multi-task LoRA (variant `none`) the shared LoRA is taken, of a hypernetwork all
    weights."""
    early_stopping_patience: NaturalNumber = 0
    """Evaluations in a row without an improvement after which the run ends, and its best weights are kept; 0 for
    never, and the last weights. What has to improve is the steering margin on held-out tasks, or the loss where a run
    has none: on held-out tasks, or else on new examples of the trained ones."""
    torch_compile: bool = False
    """Compile the base model layer by layer: some seconds at the start, then much faster on a GPU."""
    bf16: bool | None = None
    """Compute products in bfloat16 while weights stay in float32; null means only on a GPU. On processors with AMX,
    true is three times as fast; descriptions are then encoded in bfloat16 too."""
    gradient_checkpointing: bool = False
    """Compute the base's layers a second time in the backward pass: less memory, about a third more time."""
    dataloader_num_workers: NaturalNumber = 0
    """Processes that build batches."""
    logging_steps: NaturalNumber = 0
    """Steps between two rows of numbers; 0 for twenty rows a run, 50 steps at most."""
    eval_steps: NaturalNumber = 0
    """Steps between two evaluations; 0 for four a run, 1000 steps at most."""
    eval_batches: Count = 2
    """Batches of each evaluation set that an evaluation looks at."""
    save_steps: NaturalNumber = 0
    """Steps between two saved states; 0 for four a run, 2000 steps at most."""
    fsdp: Sharding = "off"
    """Shard the frozen base over the processes (FSDP2), for a base that no device holds whole."""
    ddp_timeout: Count = 600
    """Seconds after which a process that does not answer the others ends the run."""
    report_to: ReportTo = "tensorboard"
    """Where numbers are shown beside `metrics.jsonl`, which is always written."""

    def __post_init__(self) -> None:
        check_ranges(self, "train")


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """One run of `t2l train sft`."""

    base: str
    """Model reference of the base."""
    seed: Seed = 0
    conditioning: Literal["description", "input", "task"] = "description"
    """What the hypernetwork reads, see `t2l.checkpoint.CheckpointConfig.conditioning`."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """By default the base's own token states."""
    hypernet: HypernetConfig = field(default_factory=HypernetConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """How users of the finished checkpoint render prompts."""
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig

    @property
    def unconditional(self) -> bool:
        """Whether the answers cannot depend on a description, because no hypernetwork reads one."""
        return self.hypernet.variant == "none"

    def __post_init__(self) -> None:
        check_ranges(self)
        self._check_conditioning()
        if self.unconditional:
            self._check_unconditional()
        if self.hypernet.freeze_a or self.hypernet.variant == "basis":
            what = "freeze_a" if self.hypernet.freeze_a else "variant 'basis'"
            raise ConfigError(f"hypernet.{what} is for `t2l train reconstruction`; leave it out here")
        train = self.train
        if train.margin_loss_weight and train.description_in_prompt_prob == 1:
            raise ConfigError(
                "train.margin_loss_weight compares only rows whose prompt does not show the description; "
                "train.description_in_prompt_prob 1 leaves none"
            )
        if self.hypernet.pointer and (self.encoder.model != "base" or self.encoder.layers[:1] not in ((), (0,))):
            raise ConfigError(
                "hypernet.pointer takes words from the base's input embeddings: encoder.model 'base' with 0 as the "
                f"first of encoder.layers; here are '{self.encoder.model}' and {list(self.encoder.layers)}"
            )

    def _check_conditioning(self) -> None:
        kind = self.encoder.kind
        if (self.conditioning == "task") != (kind == "onehot"):
            raise ConfigError(
                f"conditioning 'task' and encoder.kind 'onehot' go together, got '{self.conditioning}' and '{kind}'"
            )
        if self.encoder.names:
            raise ConfigError("encoder.names is filled in by training; leave it out")
        if self.conditioning == "input" and kind != "sentence":
            raise ConfigError(
                "conditioning 'input' needs encoder.kind 'sentence': token states of every input fill any memory"
            )
        if self.data.augmented and self.conditioning != "description":
            raise ConfigError(
                f"{', '.join(self.data.augmented)}: descriptions say what is to be answered; here is read the "
                f"'{self.conditioning}'"
            )

    def _check_unconditional(self) -> None:
        idle = ["train.margin_loss_weight"] * (self.train.margin_loss_weight > 0)
        idle += ["data.random_description_prob"] * (self.data.random_description_prob > 0)
        if idle:
            raise ConfigError(f"No hypernetwork reads a description here, so {', '.join(idle)} would do nothing")

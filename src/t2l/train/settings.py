"""Settings of a run of `t2l train sft`, and which of them go together. Knows plain values only."""

from dataclasses import dataclass, field
from typing import Literal

from t2l.config import EncoderConfig, HypernetConfig, LoraConfig, PromptConfig
from t2l.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on."""

    tasks: str = "sni"
    """`sni`: the frozen split's training tasks without the held-back ones, from `T2L_DATA`; or own tasks as
    `t2l.tasks.load_own` reads them: a JSONL file, a folder of such files, or `hf:NAME`."""
    extra_tasks: tuple[str, ...] = ()
    """Further sources of training tasks: `t0` for the packed T0 tasks from `T2L_DATA`, `computed` for the templates of
    `t2l.train.computed`, or own tasks as for `tasks`."""
    extra_weights: tuple[float, ...] = ()
    """For each of them the share of rows that it gets; `tasks` has the rest. Without them all tasks come alike."""
    only: tuple[str, ...] = ()
    """Names of the training tasks that are used; none means all. Other held-out tasks are then not judged."""
    descriptions: str = "own"
    """`own`: what comes with the tasks. `definitions`: their full definition alone, of the tasks that have one.
    `paraphrases`: everything but it. `random`: one text of made-up words a task, always the same. Otherwise a file
    as `t2l.tasks.load_descriptions` reads it."""
    keep_descriptions: bool = True
    """Whether those of a file come on top of a task's own, or in their place."""
    file_share: float = 0.0
    """How often a description of the file is drawn for a task that has others too; 0 draws all alike."""
    relabel: float = 0.0
    """Share of the rows of a task with a few short answers that have other words in their place; only the description
    says which, see `t2l.train.relabel`."""
    relabel_vocabulary: bool = False
    """Draw the other words from those of the training tasks' descriptions, thousands of them, in place of a list of
    165: so many are not learnt by heart."""
    reform: float = 0.0
    """Share of the rows of other tasks whose answers are of another form; only the description says which."""
    relabel_variants: int = 6
    """Of each task, for both."""
    derive: float = 0.0
    """Share of a task's rows that ask something else of its examples: whether an answer is right, or which of several;
    see `t2l.train.derive`. The rest may be relabelled or reformed."""
    derive_variants: int = 4
    """Of each task."""
    made_up: float = 0.0
    """Share of rows whose adapter is written from made-up words, while prompt and answers stay: what describes nothing
    then does no harm."""
    terse_description_prob: float = 0.0
    """Share of rows whose description, in adapter and prompt, is a text that says next to nothing of the task, such as
    the name of its category: the shared LoRA should then do what it can."""
    option_placement_prob: float = 0.0
    """Share of the rows of tasks with a few short answers whose inputs list these as options, in random order and in
    many forms; above 0, `derive` also makes choices among listed answers that are replied in their words."""
    with_definition: bool = False
    """Leave out tasks that lack a definition within the encoder's window, or any other description: runs on either
    kind then train on the same tasks."""
    held_out_descriptions: int = 4
    """Paraphrases of each task that are kept for judging, where it has enough of them."""
    hold_out: int = 0
    """Training tasks that are taken out and judged with the validation tasks, spread evenly over categories."""
    max_tasks: int | None = None
    """Train on a random subset of so many tasks; a larger subset holds all of a smaller one. Null means all."""
    seed: int = 0
    """Of `hold_out` and `max_tasks`, apart from the run's seed: runs of several seeds train on the same tasks."""
    by_category: bool = False
    """Draw a category first, then one of its tasks, so that large categories weigh no more than small ones."""
    drop_long_tasks: bool = False
    """Leave out tasks none of whose examples fits into a row; otherwise they are an error."""

    @property
    def source_weights(self) -> tuple[float, ...]:
        """The share of rows that each source gets, that of `tasks` first; none where all tasks come alike."""
        return (1 - sum(self.extra_weights), *self.extra_weights) if self.extra_weights else ()

    def __post_init__(self) -> None:
        for name in ("held_out_descriptions", "hold_out"):
            if getattr(self, name) < 0:
                raise ConfigError(f"data.{name} must not be negative, got {getattr(self, name)}")
        shares = ("derive", "file_share", "made_up", "option_placement_prob", "reform", "relabel")
        for name in (*shares, "terse_description_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"data.{name} must be in [0, 1], got {getattr(self, name)}")
        if self.file_share == 1:
            raise ConfigError("data.file_share 1 leaves a task's other descriptions out; set keep_descriptions false")
        if self.extra_weights and len(self.extra_weights) != len(self.extra_tasks):
            raise ConfigError(
                f"data.extra_weights has {len(self.extra_weights)} shares for {len(self.extra_tasks)} sources in "
                "data.extra_tasks; give each one"
            )
        if self.extra_weights and (min(self.extra_weights) <= 0 or sum(self.extra_weights) >= 1):
            raise ConfigError(
                f"data.extra_weights must be above 0 and add up to less than 1, got {list(self.extra_weights)}"
            )
        if len(set(self.extra_tasks)) < len(self.extra_tasks) or "" in self.extra_tasks:
            raise ConfigError(f"data.extra_tasks must be different sources, got {list(self.extra_tasks)}")
        if self.extra_weights and self.by_category:
            raise ConfigError(
                "data.by_category draws all categories alike, data.extra_weights sources; set one of them"
            )
        for name in ("derive_variants", "relabel_variants"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {getattr(self, name)}")
        if self.max_tasks is not None and self.max_tasks < 1:
            raise ConfigError(f"data.max_tasks must be at least 1 or null, got {self.max_tasks}")
        if self.descriptions in ("own", "definitions", "paraphrases", "random"):
            if not self.keep_descriptions:
                raise ConfigError("data.keep_descriptions false needs a file in data.descriptions to take their place")
            if self.file_share:
                raise ConfigError("data.file_share needs a file in data.descriptions")
        elif self.file_share and not self.keep_descriptions:
            raise ConfigError("data.file_share mixes a file with a task's own descriptions: keep_descriptions true")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How it is trained."""

    steps: int
    tasks_per_step: int = 64
    sequence_tokens: int = 384
    """Tokens of a row; a row holds as many examples of one task as fit."""
    answer_tokens: int = 96
    """Answer tokens of a row."""
    description_in_prompt: float = 0.5
    """Share of rows whose prompt also holds the description. Between 0 and 1 the checkpoint serves both ways."""
    learning_rate: float = 5e-4
    offset_learning_rate: float = 5e-4
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises; it then falls linearly to zero."""
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0
    contrast: float = 0.0
    """Weight of a hinge on the steering margin: with another task's description, and the same prompt, the answers
    should cost `contrast_margin` more than with the right one."""
    contrast_share: float = 1.0
    """Share of a step's rows that the hinge compares; each of them is computed twice."""
    contrast_margin: float = 2.0
    """In nats per answer token."""
    contrast_in_prompt: bool = True
    """Whether rows whose prompt shows the description are compared too: there another text need not do harm."""
    distill: float = 0.0
    """Weight of the divergence KL(teacher, student) at the answers' tokens. The teacher is the frozen base with the
    description and some examples in its prompt."""
    distill_teacher: Literal["offset", "base"] = "offset"
    """Whether the teacher bears the offset as it is at that step, without a description's change, or nothing: a small
    base by itself cannot do most tasks even with examples."""
    distill_shots: int = 3
    """Other training examples of the task that a teacher's prompt shows."""
    distill_temperature: float = 1.0
    """Softens both distributions; the divergence is scaled by its square (arXiv 1503.02531)."""
    teacher_tokens: int = 1536
    """Tokens of a teacher's row. A document that does not fit into it is learnt from its answer alone; `taught` among
    the numbers of a run is the share that does fit."""
    l2: float = 0.0
    """Weight of the mean square of the written A plus that of B (the reference: 1e-3)."""
    label_smoothing: float = 0.0
    """Share of the target spread over the whole vocabulary (the reference: 0.1)."""
    neftune_alpha: float = 0.0
    """Uniform noise on the base's input embeddings, at most alpha / sqrt(T·E) in each of the E places of each of a
    document's T tokens (arXiv 2310.05914; the paper: 5). T is counted for each document, not for a packed row."""
    conditioning_dropout: float = 0.0
    """Share of rows whose adapter is the offset alone, as for no description at all: the shared LoRA then learns to
    serve by itself."""
    encoding_noise: float = 0.0
    """Gaussian noise on what the hypernetwork reads, as a share of its root mean square."""
    mix_descriptions: float = 0.0
    """Share of rows that read a random blend of two descriptions of their task; sentence encoders only."""
    start_from: str | None = None
    """Checkpoint to start from: of a multi-task LoRA (variant `none`) the offset, of a hypernetwork everything."""
    early_stop: Literal["off", "margin", "loss"] = "off"
    """What decides which weights are kept, and when to stop: the steering margin on held-out tasks, or the loss on
    them (on new examples of the trained tasks, where no task is held out)."""
    patience: int = 3
    """Evaluations in a row without a better one after which early stopping ends the run."""
    compile: bool = False
    """Compile the base model layer by layer: some seconds at the start, then much faster on a GPU."""
    bfloat16: bool | None = None
    """Multiply in bfloat16, weights stay in float32: if null, on a GPU. On processors with AMX, true is three times
    as fast; descriptions are then encoded so too."""
    gradient_checkpointing: bool = False
    """Compute the base's layers a second time in the backward pass: less memory, about a third more time."""
    workers: int = 0
    """Processes that build batches."""
    log_every: int = 50
    evaluate_every: int = 1000
    evaluate_batches: int = 2
    """Batches of each suite that an evaluation looks at."""
    save_every: int = 2000
    tensorboard: bool = True
    """Also write event files for TensorBoard, if it is installed."""
    tracker: Literal["none", "wandb", "trackio"] = "none"
    """Also report to this tracker, by its own configuration; nothing of it is imported otherwise."""

    def __post_init__(self) -> None:
        counts = (
            "steps",
            "tasks_per_step",
            "patience",
            "teacher_tokens",
            "log_every",
            "evaluate_every",
            "evaluate_batches",
            "save_every",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.contrast_share <= 1:
            raise ConfigError(f"train.contrast_share must be in (0, 1], got {self.contrast_share}")
        shares = (
            "description_in_prompt",
            "warmup",
            "label_smoothing",
            "conditioning_dropout",
            "mix_descriptions",
        )
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"train.{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("contrast", "distill", "distill_shots", "l2", "neftune_alpha", "encoding_noise", "weight_decay"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.{name} must not be negative, got {getattr(self, name)}")
        if self.distill_temperature <= 0:
            raise ConfigError(f"train.distill_temperature must be above 0, got {self.distill_temperature}")


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """One run of `t2l train sft`."""

    base: str
    """Model reference of the base."""
    seed: int = 0
    method: Literal["adapters", "full"] = "adapters"
    """`full` trains the base's own weights in place of adapters, a baseline; it leaves a model folder."""
    reads: Literal["description", "input", "task"] = "description"
    """What the hypernetwork reads, see `t2l.checkpoint.CheckpointConfig.reads`."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    encoder: EncoderConfig
    hypernet: HypernetConfig = field(default_factory=HypernetConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """How the finished checkpoint's users render prompts."""
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig

    @property
    def blind(self) -> bool:
        """Whether the answers cannot depend on anything a hypernetwork reads, because there is none."""
        return self.method == "full" or self.hypernet.variant == "none"

    def __post_init__(self) -> None:
        train, kind = self.train, self.encoder.kind
        if (self.reads == "task") != (kind == "onehot"):
            raise ConfigError(f"reads 'task' and encoder.kind 'onehot' go together, got '{self.reads}' and '{kind}'")
        if self.encoder.names:
            raise ConfigError("encoder.names is filled in by training; leave it out")
        if self.reads == "input" and kind != "sentence":
            raise ConfigError(
                "reads 'input' needs encoder.kind 'sentence': token states of every input fill any memory"
            )
        if self.method == "full":
            if self.hypernet.variant != "none":
                raise ConfigError(f"method 'full' needs hypernet.variant none, got '{self.hypernet.variant}'")
            if train.start_from:
                raise ConfigError("method 'full' starts from the base; train.start_from names a checkpoint of adapters")
            if train.l2:
                raise ConfigError("method 'full' writes no adapters that train.l2 could keep small")
            if train.distill:
                raise ConfigError("method 'full' trains the base, which train.distill needs frozen as the teacher")
        if (self.data.relabel or self.data.reform or self.data.derive) and self.reads != "description":
            raise ConfigError(
                f"data.relabel, reform and derive say in descriptions what to answer; here is read the '{self.reads}'"
            )
        if self.data.made_up and (self.reads != "description" or self.blind):
            raise ConfigError("data.made_up needs a hypernetwork that reads descriptions")
        if self.blind:
            reading = ("contrast", "conditioning_dropout", "encoding_noise", "mix_descriptions")
            idle = [f"train.{name}" for name in reading if getattr(train, name)]
            if idle:
                raise ConfigError(f"Nothing reads a description here, so {', '.join(idle)} would do nothing")
        if train.conditioning_dropout + self.data.terse_description_prob > 1:
            raise ConfigError(
                f"train.conditioning_dropout {train.conditioning_dropout:g} and data.terse_description_prob "
                f"{self.data.terse_description_prob:g} are shares of the same rows and must not exceed 1 together"
            )
        if self.hypernet.prompt_aware and train.description_in_prompt in (0, 1):
            raise ConfigError(
                "hypernet.prompt_aware tells prompts with the description from those without; "
                f"train.description_in_prompt {train.description_in_prompt:g} has one kind only"
            )
        if train.contrast and not train.contrast_in_prompt and train.description_in_prompt == 1:
            raise ConfigError(
                "train.contrast_in_prompt false compares only rows whose prompt does not show the description; "
                "train.description_in_prompt 1 leaves none"
            )
        if self.hypernet.pointer and (self.encoder.model != "base" or self.encoder.layers[:1] != (0,)):
            raise ConfigError(
                "hypernet.pointer takes words from the base's input embeddings: encoder.model 'base' with 0 as the "
                f"first of encoder.layers; here are '{self.encoder.model}' and {list(self.encoder.layers)}"
            )
        if train.mix_descriptions and (kind != "sentence" or self.reads != "description"):
            raise ConfigError("train.mix_descriptions needs encoder.kind 'sentence' and reads 'description'")
        if train.early_stop == "margin" and (self.blind or self.reads == "task"):
            raise ConfigError(
                "train.early_stop 'margin' needs a hypernetwork that can read held-out tasks; here use 'loss'"
            )

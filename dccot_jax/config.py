"""The configuration: every key with its default, changing it, and checks that run before any work.

A config file is Python with a `get_config()` that starts from `default_config()` and changes values. The dict is
locked: an unknown or ill-typed key fails at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from dccot_jax import config_checks
from dccot_jax.records import InputError, canonical_json

AUGMENT_METHODS = ("rephrase", "question", "answer", "reverse")
CURRICULA = ("none", "staged", "competence", "anti", "random_growing")
MIXES = ("none", "length", "teacher", "domain")
MIX_MODES = ("pooled", "per_question")
OPTIMIZERS = ("adamw", "adafactor", "muon")
SCHEDULES = ("constant", "linear", "cosine", "wsd")
TRAIN_FORMATS = ("cot", "no_cot")
LOSS_MASKS = ("response", "full")
GRADIENT_NORMS = ("ghost", "exact")
PROJECTIONS = ("rademacher", "normal")
LOSS_WEIGHTS = ("token", "sequence", "reverse")
DTYPES = ("float32", "bfloat16")
ATTENTION = ("auto", "xla", "splash", "cudnn", "tokamax")


class ConfigError(InputError):
    """A config that cannot work; the message names the field, the value and what would be accepted."""


def default_config() -> ConfigDict:
    """Every key of a run with its default value."""
    c = ConfigDict()
    c.name = "run"
    c.seed = 0
    c.seeds = ()  # several seeds per arm; () means (seed,)
    c.data_dir = ""  # local files of public tasks; "" asks the hub
    c.compute_dtype = "float32"  # float32 | bfloat16: activations; parameters stay float32
    c.attention = "auto"  # auto | xla | splash (TPU) | cudnn, tokamax (NVIDIA GPU): changes speed and last bits, see docs/training.md
    # -1: all remaining devices. Several TPU slices are joined by data, which must be a multiple of their number.
    c.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})

    c.student = ConfigDict()
    c.student.path = ""  # Hugging Face directory or .gguf file; "" means random init of `student.model`
    c.student.tokenizer = "embedded"  # embedded | Hugging Face directory; ignored when `path` is set
    c.student.model = ConfigDict(
        {
            "family": "llama",  # llama | mistral | qwen2 | qwen3 | gemma | gemma2 | gemma3_text | smollm3
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_layers": 4,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 32,
            "rope_theta": 10000.0,
            "tie_embeddings": True,
            "max_positions": 1024,
            "sliding_window": 0,  # tokens seen in the layers that have a window by the family's own pattern; 0: no windows
            "attn_softcap": 0.0,  # gemma2 (published: 50); 0: none
            "final_softcap": 0.0,  # gemma2 (published: 30), gemma3_text; 0: none
        }
    )

    c.traces = ConfigDict()
    c.traces.task = "synth_arithmetic"  # registry name of the training task
    c.traces.seed = 0  # root of everything random in `traces` and `augment`: runs of several seeds share their data
    c.traces.questions = 0  # how many training questions, in the task's own order; 0 means all
    c.traces.samples = 1  # traces per question and teacher
    c.traces.teachers = ({"kind": "scripted", "style": "verbose"},)  # each a dict, see docs/teachers.md
    c.traces.temperature = 0.7
    c.traces.max_tokens = 1024

    c.augment = ConfigDict()
    c.augment.methods = ()  # any of AUGMENT_METHODS
    c.augment.teacher = {"kind": "scripted", "style": "verbose"}
    c.augment.temperature = 0.7
    c.augment.max_tokens = 1024
    c.augment.answers = 3  # new answer paths per question
    c.augment.rephrasings = 1
    c.augment.votes = 5  # answers per new question, majority is the pseudo-gold
    c.augment.agreement = 0.6  # share of votes a new question needs

    c.verify = ConfigDict()
    c.verify.time_limit_seconds = 5.0  # hard limit for one answer
    c.verify.against = "registered"  # test questions to keep out: registered (every task at hand) | evaluated (this run's)
    c.verify.ngram_sizes = (8, 13)  # runs of words shared with test questions, reported per task
    c.verify.ngram_drop_size = 13  # rows that hold ngram_drop_share of a test question's n-grams of this size
    c.verify.ngram_drop_share = 0.0  # are dropped; 0: none is

    c.tokens = ConfigDict()
    c.tokens.max_length = 256  # tokens of prompt and completion; longer rows are dropped and counted
    c.tokens.format = "cot"  # cot: rationale and answer | no_cot: the gold answer alone
    c.tokens.train_suffix = True  # training prompts carry the task's prompt suffix, as evaluation does

    c.score = ConfigDict()
    c.score.student = "base"  # base | warmup | a path to a checkpoint
    c.score.signals = ()
    c.score.layout = "packed"  # packed | bucketed: how rows lie in a tile; changes speed and last bits, see docs/performance.md
    c.score.chunk_rows = 256  # rows per committed chunk
    c.score.batch_tiles = 4  # tiles per dispatch; changes speed, never scores
    c.score.warmup = ConfigDict({"share": 0.1, "steps": 50})
    c.score.sampling = ConfigDict({"samples": 8, "temperature": 1.0, "seed": 0})  # pass_rate: answers per question, how they are drawn
    c.score.gradients = ConfigDict()  # of the signals `grand` and `less`; see docs/gradients.md
    c.score.gradients.norm = "ghost"  # grand: ghost | exact: one full gradient after the other, to check with
    c.score.gradients.norm_subset = ("*",)  # grand: weights whose gradient counts, names or patterns
    # less: weights of the layers (and norms) whose gradient is projected; (): the adapters, or where there are none wq and wv.
    c.score.gradients.subset = ()
    c.score.gradients.checkpoints = 4  # less: snapshots of the warm-up training; or as many as a given train artifact holds
    c.score.gradients.dim = 8192  # less: numbers per projected gradient, a multiple of 32
    c.score.gradients.projection = "rademacher"  # rademacher | normal
    c.score.gradients.seed = 0  # less: of the projection
    # less: sub-tasks, each {"task": "svamp", "split": "train", "rows": 32} or {"traces": 32}; (): 32 items of the training task.
    c.score.gradients.validation = ()
    # Models to compare the student with, each a train artifact or a Hugging Face directory with the student's tokenizer:
    c.score.models = ConfigDict({"holdout": "", "reference": "", "teacher": ""})  # of rho, excess, teacher_student_gap
    c.score.over_time = ConfigDict()  # s2l, forgetting, learning_speed
    c.score.over_time.snapshots = 4  # of the warm-up training; or as many as a given train artifact holds
    c.score.over_time.learned = 0.8  # forgetting: token accuracy from which a row counts as learned
    c.score.sentences = ConfigDict({"model": ""})  # sentence_prompt, sentence_rationale: directory or hub name of the encoder
    c.score.judge = ConfigDict()  # judge, judge_<criterion>, proxy_complexity, proxy_quality
    c.score.judge.judges = ()  # teachers that grade, each a dict as in traces.teachers; two or more: their agreement is reported
    c.score.judge.temperature = 0.0
    c.score.judge.max_tokens = 512
    c.score.judge.retries = 2  # further requests where a reply is no verdict; then the row has no score
    c.score.deita = ConfigDict()  # deita_complexity, deita_quality
    c.score.deita.complexity_model = ""  # as score.models, any tokenizer; "": the student itself, as a proxy
    c.score.deita.quality_model = ""
    c.score.deita.complexity_prompt = (
        "Grade how complex the question below is, from 1 (immediate) to 6 (hard for an expert). Reply with the number alone.\n\n"
        "Question: {question}"
    )
    c.score.deita.quality_prompt = (
        "Grade the response to the question below, from 1 (useless) to 6 (could hardly be better). Reply with the number alone.\n\n"
        "Question: {question}\nResponse: {response}"
    )
    c.score.deita.chat = True  # the prompt in the model's chat template; False: as plain text

    c.select = ConfigDict()
    # Selectors applied in order, e.g. ({"name": "teacher_correct"}, {"name": "top", "signal": "ifd_loss", "rows": 500}).
    c.select.steps = ()
    # Parquet files with a column id and further columns to select by: numbers, or lists (embeddings, loss trajectories).
    c.select.tables = ()

    c.mix = ConfigDict()
    c.mix.kind = "none"  # none | length | teacher | domain
    c.mix.alpha = 0.2  # share of the long / strong part
    c.mix.mode = "pooled"  # pooled | per_question
    c.mix.total_examples = 0  # fixed size of the mix; 0: as many as there are
    c.mix.total_tokens = 0  # or a fixed number of completion tokens
    c.mix.strong = ()  # teacher mix: names of the strong teachers
    c.mix.long = ()  # length mix: styles or levels that are long; (): longer than the task's median
    c.mix.weights = {}  # domain mix: weight per task; {}: proportional
    c.mix.temperature = 1.0  # domain mix: weights ~ n^(1/temperature)

    c.curriculum = ConfigDict()
    c.curriculum.kind = "none"
    c.curriculum.difficulty = "n_steps"  # n_steps | completion_tokens | question_tokens | any scored signal
    c.curriculum.stages = 3  # staged: number of buckets
    c.curriculum.stage_shares = ()  # staged: share of the steps per stage; (): equal
    c.curriculum.c0 = 0.1  # competence: share of the data available at step 0
    c.curriculum.full_at = 0.7  # competence: share of the steps after which all data are used
    c.curriculum.pacing = "staged"  # anti, random_growing: whose size curve they follow, staged | competence

    c.train = ConfigDict()
    c.train.steps = 0  # optimizer steps; 0 means `epochs`
    c.train.epochs = 1.0
    c.train.rows_per_step = 16  # packed rows in one optimizer step, over all hosts
    c.train.row_tokens = 256  # length of a packed row
    c.train.microbatches = 1
    c.train.loss_mask = "response"
    c.train.loss_weight = "token"
    c.train.optimizer = "adamw"  # adamw | adafactor | muon (for the layers' matrices; AdamW for the rest)
    c.train.moment_dtype = "float32"  # float32 | bfloat16: of the first moment of adamw and muon; adafactor has none
    c.train.learning_rate = 1e-3
    c.train.schedule = "cosine"  # constant | linear | cosine | wsd (warm-up, stable, decay)
    c.train.warmup_steps = 20
    c.train.final_lr_share = 0.1
    c.train.decay_share = 0.2  # wsd: share of the steps over which the rate falls
    c.train.lora = ConfigDict(
        {
            "preset": "",  # one of LORA_PRESETS instead of rank, alpha and targets
            "rank": 0,  # 0: all weights are trained
            "alpha": 0.0,  # the adapters' products are scaled by alpha / rank; 0: alpha = 2 · rank
            "dropout": 0.0,
            "targets": (),  # q_proj k_proj v_proj o_proj gate_proj up_proj down_proj, or all-linear
            "frozen_dtype": "float32",  # of the weights that are not trained
        }
    )
    c.train.distill = ConfigDict(
        {
            "kind": "none",  # none | forward_kl | reverse_kl | jsd: from the next-token distributions of a teacher with the same tokens
            "teacher": "",  # Hugging Face directory, or a student or train artifact; runs beside the student, on the same mesh
            "weight": 1.0,  # loss = (1 - weight) · cross-entropy + weight · divergence
            "temperature": 1.0,  # of both distributions
            "beta": 0.5,  # jsd: share of the teacher in the mixture
            "teacher_dtype": "bfloat16",  # of the teacher's parameters
            "top_k": 0,  # its likeliest tokens stored ahead, per trained position, instead of the teacher beside the student; 0: none
            "top_k_dtype": "float32",  # float16 | float32, of the stored log-probabilities
        }
    )
    c.train.momentum = 0.95  # muon
    c.train.b1 = 0.9
    c.train.b2 = 0.95
    c.train.eps = 1e-8
    c.train.weight_decay = 0.0
    c.train.clip_norm = 1.0
    c.train.remat = "nothing_saveable"  # nothing_saveable | dots | none
    c.train.checkpoint_every = 200  # steps; recorded, not hashed
    c.train.keep_checkpoints = 2  # the newest so many; negative: all, and they stay when the training is done
    c.train.keep_best = 0  # and so many of lowest training loss (mean over about 50 steps); these stay when the training is done
    c.train.max_skipped = 10  # steps in a row with a loss or gradient that is not finite; one more stops the training
    c.train.step_deadline_seconds = 600.0  # several processes: one that waits longer for a step ends; 0: never
    c.train.snapshots = 0  # evenly spaced parameters and Adam moments kept in the artifact, for `less` and other looks back
    c.train.log_every = 10

    c.evaluate = ConfigDict()
    c.evaluate.iid = ()  # task names; all three empty: the training task's own relations
    c.evaluate.ood = ()
    c.evaluate.cross = ()
    c.evaluate.limit = 0  # items per task, chosen by id hash; 0 means all
    c.evaluate.limits = {}  # the same for single tasks, e.g. {"svamp": 300}
    c.evaluate.max_new_tokens = 256
    c.evaluate.batch_rows = 64  # rows generated together
    c.evaluate.gold_nll = True  # mean NLL of the gold rationale, where the task has one
    c.evaluate.base = True  # evaluate the untrained student as a reference row

    c.report = ConfigDict()
    c.report.samples = 6  # items shown side by side
    c.report.bootstrap = 2000
    c.report.compare = ()  # pairs of arm names for paired tests, e.g. (("correct_noisy", "vanilla_noisy"),)

    # Each arm: its name and the dotted keys it changes, e.g. ({"name": "no_cot", "tokens.format": "no_cot"},); (): one arm.
    c.arms = ()
    return c.lock()


def to_plain(value: Any) -> Any:
    """ConfigDicts and tuples as plain dicts and lists, ready for JSON."""
    if isinstance(value, ConfigDict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


def lookup(config: ConfigDict, key: str) -> Any:
    """Value of a dotted key. Raises ConfigError naming the nearest valid key."""
    value: Any = config
    for depth, name in enumerate(key.split(".")):
        if not isinstance(value, ConfigDict) or name not in value:
            raise ConfigError(_unknown(config, key, depth))
        value = value[name]
    return value


def override(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A copy of `config` with dotted keys changed. Raises ConfigError on an unknown key or a value of another type."""
    copy = config.copy_and_resolve_references()
    for key, value in changes.items():
        lookup(copy, key)
        try:
            copy.update_from_flattened_dict({key: _as_tuple(value)})
        except (TypeError, KeyError, ValueError) as error:
            raise ConfigError(f"config.{key}: {value!r} is not acceptable ({error})") from None
    return copy.lock()


def arms(config: ConfigDict) -> dict[str, ConfigDict]:
    """One config per arm, in the given order; a config without arms is one arm named after the run.

    Raises ConfigError on an arm without a name, a name used twice, or a change that `override` refuses.
    """
    if not config.arms:
        return {config.name: config}
    found: dict[str, ConfigDict] = {}
    for place, arm in enumerate(config.arms):
        changes = dict(arm)
        name = changes.pop("name", None)
        if not isinstance(name, str) or not name or name in found or name == "base":
            raise ConfigError(f"config.arms[{place}].name: {name!r} must be a non-empty string, used once, and not 'base'")
        if {"arms", "seeds"} & set(changes):
            raise ConfigError(f"config.arms[{place}] ({name}): 'arms' and 'seeds' cannot be changed by an arm")
        try:
            found[name] = override(config, {**changes, "arms": ()})
        except ConfigError as error:
            raise ConfigError(f"config.arms[{place}] ({name}): {error}") from None
    return found


def seeds(config: ConfigDict) -> tuple[int, ...]:
    return tuple(config.seeds) or (config.seed,)


def validate(config: ConfigDict) -> None:
    """Check a config before any work. Raises ConfigError at the first field that cannot work."""
    for key in _flat_keys(default_config()):
        lookup(config, key)
    if found := config_checks.problem(dict(flatten("", config))):
        raise ConfigError(found)
    _one_of(config, "compute_dtype", DTYPES)
    _one_of(config, "attention", ATTENTION)
    _one_of(config, "verify.against", ("registered", "evaluated"))
    _one_of(config, "mix.kind", MIXES)
    _one_of(config, "mix.mode", MIX_MODES)
    _one_of(config, "curriculum.kind", CURRICULA)
    _one_of(config, "curriculum.pacing", ("staged", "competence"))
    _one_of(config, "train.optimizer", OPTIMIZERS)
    _one_of(config, "train.moment_dtype", DTYPES)
    _one_of(config, "train.schedule", SCHEDULES)
    _one_of(config, "train.loss_mask", LOSS_MASKS)
    _one_of(config, "train.loss_weight", LOSS_WEIGHTS)
    _one_of(config, "tokens.format", TRAIN_FORMATS)
    _one_of(config, "score.gradients.norm", GRADIENT_NORMS)
    _one_of(config, "score.gradients.projection", PROJECTIONS)
    _one_of(config, "score.layout", ("packed", "bucketed"))
    _one_of(config, "train.remat", ("nothing_saveable", "dots", "none"))
    for method in config.augment.methods:
        if method not in AUGMENT_METHODS:
            raise ConfigError(
                f"config.augment.methods: {method!r} is not one of {', '.join(AUGMENT_METHODS)}{nearest(method, AUGMENT_METHODS)}"
            )
    if config.verify.ngram_drop_share and config.verify.ngram_drop_size not in config.verify.ngram_sizes:
        sizes = ", ".join(map(str, config.verify.ngram_sizes)) or "none"
        raise ConfigError(f"config.verify.ngram_drop_size: {config.verify.ngram_drop_size} is not in verify.ngram_sizes ({sizes})")
    if config.train.optimizer == "adafactor" and config.train.moment_dtype != "float32":
        raise ConfigError(
            f"config.train.moment_dtype: {config.train.moment_dtype!r} does not go with train.optimizer = 'adafactor', which keeps no first"
            " moment; 'adamw' and 'muon' do"
        )
    if config.score.gradients.dim < 1 or config.score.gradients.dim % 32:
        raise ConfigError(f"config.score.gradients.dim: {config.score.gradients.dim} must be a positive multiple of 32")
    if not 0 <= config.score.gradients.seed < 2**31:
        raise ConfigError(f"config.score.gradients.seed: {config.score.gradients.seed} must lie in [0, 2^31)")
    if config.mix.kind == "teacher" and not config.mix.strong:
        raise ConfigError("config.mix.strong: empty; mix.kind = 'teacher' needs the names of the strong teachers, e.g. ('gpt-4o',)")
    for task, weight in config.mix.weights.items():
        if not isinstance(weight, (int, float)) or weight < 0:
            raise ConfigError(f"config.mix.weights: {task!r}: {weight!r} must be a number of at least 0")
    if config.mix.total_examples and config.mix.total_tokens:
        raise ConfigError(
            f"config.mix.total_tokens: {config.mix.total_tokens} beside mix.total_examples = {config.mix.total_examples}; give one of them"
        )
    if config.train.rows_per_step % config.train.microbatches:
        raise ConfigError(
            f"config.train.microbatches: {config.train.microbatches} does not divide train.rows_per_step = {config.train.rows_per_step}"
        )
    if config.tokens.max_length > config.train.row_tokens:
        raise ConfigError(
            f"config.tokens.max_length: {config.tokens.max_length} exceeds train.row_tokens = {config.train.row_tokens};"
            " a row must fit a packed row"
        )
    if config.train.steps == 0 and config.train.epochs <= 0:
        raise ConfigError("config.train.steps: 0 needs train.epochs > 0")
    if not config.traces.teachers:
        raise ConfigError("config.traces.teachers: empty; give at least one teacher, e.g. ({'kind': 'scripted', 'style': 'verbose'},)")
    if (
        config.curriculum.kind == "staged"
        and config.curriculum.stage_shares
        and len(config.curriculum.stage_shares) != config.curriculum.stages
    ):
        raise ConfigError(
            f"config.curriculum.stage_shares: {len(config.curriculum.stage_shares)} shares for {config.curriculum.stages} stages"
        )
    if config.arms:
        for arm in arms(config).values():
            validate(arm)
    canonical_json(to_plain(config))


def resolved_text(config: ConfigDict) -> str:
    """Sorted `key: value` lines, one per leaf: what is stored beside a run and compared in golden files."""
    return "".join(f"{key}: {canonical_json(value)}\n" for key, value in sorted(flatten("", config)))


def _one_of(config: ConfigDict, key: str, accepted: Sequence[str]) -> None:
    value = lookup(config, key)
    if value not in accepted:
        raise ConfigError(f"config.{key}: {value!r} is not one of {', '.join(accepted)}{nearest(str(value), accepted)}")


def nearest(name: str, accepted: Sequence[str]) -> str:
    """`` (did you mean 'x'?)`` for the accepted name closest to `name`, or nothing where none is close."""
    close = difflib.get_close_matches(name, accepted, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _unknown(config: ConfigDict, key: str, depth: int) -> str:
    """Message for a key that fails at its `depth`-th name: nearest name there, else the same leaf name elsewhere."""
    names = key.split(".")
    level: Any = config
    for name in names[:depth]:
        level = level[name]
    here = list(level) if isinstance(level, ConfigDict) else []
    close = difflib.get_close_matches(names[depth], here, n=1)
    if close:
        return f"config.{key}: no such key; did you mean config.{'.'.join([*names[:depth], close[0], *names[depth + 1 :]])}?"
    keys = _flat_keys(config)
    leaves = difflib.get_close_matches(names[-1], [other.split(".")[-1] for other in keys], n=1, cutoff=0.8)
    if leaves:
        found = next(other for other in keys if other.split(".")[-1] == leaves[0])
        return f"config.{key}: no such key; did you mean config.{found}?"
    return f"config.{key}: no such key; keys here: {', '.join(sorted(here)) or 'none'}"


def _flat_keys(config: ConfigDict, prefix: str = "") -> list[str]:
    keys = []
    for name, value in config.items():
        full = f"{prefix}{name}"
        keys += _flat_keys(value, f"{full}.") if isinstance(value, ConfigDict) and value else [full]
    return keys


def flatten(prefix: str, value: Any) -> list[tuple[str, Any]]:
    """(dotted key, plain value) of every leaf below `value`, whose own key is `prefix`."""
    if isinstance(value, ConfigDict) and value:
        return [pair for name, item in value.items() for pair in flatten(f"{prefix}.{name}" if prefix else name, item)]
    return [(prefix, to_plain(value))]


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value

"""From the engine's arguments to facts: files, config, tokenizer, device, limits.

Each fact is decided here once. Does not know how a step runs.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nanovllm import kernels, loader
from nanovllm.config import DTYPES, EngineArgs
from nanovllm.kernels import blocks, cpu
from nanovllm.kernels.choice import KernelChoice
from nanovllm.loader.fields import Fields
from nanovllm.models.config import ModelConfig
from nanovllm.models.registry import read_config
from nanovllm.weights.blocks import FLOAT_TYPES
from nanovllm.weights.select import MXFP4

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nanovllm.loader.gguf_tokenizer import GGUFTokenizer

logger = logging.getLogger("nanovllm")

GPU_BLOCK_SIZE = 64
CPU_BLOCK_SIZE = 16
LARGE_GPU = 70 << 30  # bytes of memory


class Setup:
    """The decisions of one engine on this machine. Every rank has the same Setup.

    Raises ValueError for arguments that cannot work with this model or on this machine.
    """

    def __init__(self, args: EngineArgs) -> None:
        self.args = args
        self.compilation = args.compilation
        self.files = loader.resolve(
            args.model,
            revision=args.revision,
            download_dir=args.download_dir,
            hf_token=args.hf_token,
            load_format=args.load_format,
        )
        self.hf_config = loader.load_hf_config(
            self.files, trust_remote_code=args.trust_remote_code, hf_overrides=args.hf_overrides
        )
        self.config = self._model_config()
        folder = None if args.generation_config in ("auto", "vllm") else args.generation_config
        stored = loader.load_generation_config(self.files, folder)
        override = args.override_generation_config or {}
        self.generation_config = {**stored, **override}
        recommended = {} if args.generation_config == "vllm" else stored
        self.sampling_defaults = {**recommended, **override}
        self.generation_config_path = loader.generation_config_path(self.files, folder)
        self.tokenizer = None if args.skip_tokenizer_init else self._load_tokenizer()
        self.eos_token_ids = self._eos_token_ids()
        self.device = pick_device(args.device)
        self.dtype = pick_dtype(args.dtype, self._stored_dtype(), self.device)
        self.kv_cache_dtype = self._kv_cache_dtype()
        self.weight_format = self._weight_format()
        self.block_size = args.block_size or default_block_size(self.device)
        self.max_model_len = self._max_model_len()
        tokens, seqs = step_limits(self.device)
        self.max_num_batched_tokens = args.max_num_batched_tokens or tokens
        self.max_num_seqs = args.max_num_seqs or min(seqs, self.max_num_batched_tokens)
        self._check_limits()

    def kernel_choice(self) -> KernelChoice:
        """A new choice, for one rank. On a CPU our own kernels compute what GPUs compile."""
        compilation = self.compilation
        compiles = self.device.type == "cuda" and self.compiles_models
        return KernelChoice(compilation.left_out(), compiles, compilation.backend)

    @property
    def compiles_models(self) -> bool:
        """Whether the models that torch.compile suits run compiled.

        On a CPU they do if the user asks for it, because they are hardly faster then
        (docs/experiments.md). For GPUs torch.compile needs Triton.
        """
        mode = self.compilation.mode
        if self.device.type == "cpu":
            return mode not in (None, 0)
        return mode != 0 and kernels.gpu() is not None

    def _model_config(self) -> ModelConfig:
        """The config of the model. Its `tie_embeddings` follows the checkpoint."""
        args = self.args
        config = read_config(
            self.hf_config, self.config_path, args.model_impl, args.trust_remote_code
        )
        says_tied = config.tie_embeddings and self.args.load_format != "dummy"
        if says_tied and loader.head_differs(self.files):
            logger.warning(
                "%s: tie_word_embeddings is true, but the checkpoint's lm_head.weight is no copy "
                "of its model.embed_tokens.weight: both are used, as transformers does",
                self.config_path,
            )
            config = replace(config, tie_embeddings=False)
        if self.args.enable_expert_parallel:
            if not config.has_experts:
                raise ValueError(
                    f"enable_expert_parallel=True: {self.config_path} describes a model without "
                    "experts; accepted is False"
                )
            config = replace(config, expert_parallel=True)
        return config

    @property
    def config_path(self) -> Path:
        """The file that the config is read from."""
        gguf = self.files.gguf
        return self.files.folder / "config.json" if gguf is None else gguf.path

    def _load_tokenizer(self) -> PreTrainedTokenizerBase | GGUFTokenizer:
        args = self.args
        return loader.load_tokenizer(
            args.tokenizer or self.files,
            config=None if args.tokenizer else self.hf_config,
            tokenizer_mode=args.tokenizer_mode,
            trust_remote_code=args.trust_remote_code,
            revision=args.tokenizer_revision,
            download_dir=args.download_dir,
            hf_token=args.hf_token,
        )

    def _eos_token_ids(self) -> frozenset[int]:
        """The end tokens of the tokenizer, and of generation_config.json or config.json.

        Ids outside the vocabulary are left out.
        """
        name = "eos_token_id"
        if self.generation_config.get(name) is not None:
            fields = Fields(self.generation_config_path, self.generation_config.get)
        else:
            text = loader.text_config(self.hf_config)
            own_field = getattr(self.hf_config, name, None)
            fields = Fields(
                self.config_path,
                lambda name: getattr(text, name, None) if own_field is None else own_field,
            )
        found = fields.ids(name)
        own = getattr(self.tokenizer, name, None)
        if own is not None:
            found.append(own)
        return frozenset(token_id for token_id in found if 0 <= token_id < self.config.vocab_size)

    def _stored_dtype(self) -> torch.dtype | None:
        """The dtype of the checkpoint. None if it is not known, or not needed."""
        if self.args.dtype != "auto":
            return None
        return loader.checkpoint_dtype(self.hf_config, self.files)

    def _weight_format(self) -> str | None:
        """The storage format of matrices (weights.select.FORMATS, MXFP4), or None for floats.

        On a CPU the blocks of a GGUF file and experts in MXFP4 stay as they are stored.
        Raises ValueError for a `quantization` that is not the checkpoint's.
        """
        gguf = self.files.gguf
        stored = self.config.quantization if gguf is None else "gguf"
        self._check_quantization(stored)
        is_dummy = self.args.load_format == "dummy"
        if stored is None or is_dummy:
            return None
        if self.args.quantization == "none":
            reason = "of quantization='none'"
        elif self.device.type != "cpu":
            reason = "there are no kernels for it on GPUs"
        elif blocks.load() is None:
            reason = "the CPU's kernels for it could not be built"
        elif gguf is None:
            return MXFP4
        else:
            return None if gguf.matrix_types() == {FLOAT_TYPES[self.dtype]} else "blocks"
        if gguf is None:
            logger.info("experts in MXFP4 are dequantised to %s, because %s", self.dtype, reason)
        return None

    def _check_quantization(self, stored: str | None) -> None:
        """stored: the format of the checkpoint."""
        asked = self.args.quantization
        if asked in (None, "none", stored):
            return
        is_other = "is no GGUF file" if asked == "gguf" else f"holds no weights in {asked}"
        more = "" if stored is None else f", {stored!r}"
        raise ValueError(
            f"quantization={asked!r}: {self.args.model} {is_other}; accepted for it are None{more} "
            "and 'none'"
        )

    def _kv_cache_dtype(self) -> str:
        """ "auto" for pages in the model's dtype, or "fp8"."""
        asked = self.args.kv_cache_dtype
        if asked in ("auto", "fp8"):
            return asked
        if DTYPES[asked] != str(self.dtype).removeprefix("torch."):
            raise ValueError(
                f"kv_cache_dtype={asked!r} is another dtype than the model's, {self.dtype}; "
                "accepted are 'auto', 'fp8' and the model's dtype"
            )
        return "auto"

    def _max_model_len(self) -> int:
        """The longest sequence in tokens.

        RoPE's scaling sets the largest max_model_len.
        """
        rope, trained = self.config.rope, self.config.max_position
        scaled = trained
        if rope["rope_type"] == "yarn":
            original = rope.get("original_max_position_embeddings") or trained
            scaled = int(original * rope.get("factor", 1))
        elif rope["rope_type"] == "linear" and self.config.sliding_rope is None:
            # Gemma 3 states the scaled length.
            scaled = int(trained * rope["factor"])
        longest = max(scaled, trained)
        asked = self.args.max_model_len
        if asked is not None and asked > longest:
            raise ValueError(
                f"max_model_len={asked} is above the model's own {longest}; accepted is at most "
                f"{longest}"
            )
        return asked or longest

    def _check_limits(self) -> None:
        """Raises ValueError for limits of a step that contradict each other.

        Without chunked prefill a step must take a whole prompt: the default of
        max_num_batched_tokens then grows to max_model_len.
        """
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ValueError(
                f"max_num_seqs={self.max_num_seqs} must not exceed max_num_batched_tokens="
                f"{self.max_num_batched_tokens}: each running sequence computes a token a step"
            )
        if self.args.enable_chunked_prefill or self.max_num_batched_tokens >= self.max_model_len:
            return
        if self.args.max_num_batched_tokens is not None:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
                f"max_model_len={self.max_model_len} with enable_chunked_prefill=False"
            )
        self.max_num_batched_tokens = self.max_model_len

    def __getstate__(self) -> dict[str, object]:
        """The state that another rank needs to make its runner.

        It has no Hugging Face config, no tokenizer and no classes of the user, because
        other ranks do not read them.
        """
        args = replace(self.args, hf_overrides=None, logits_processors=None)
        return {**vars(self), "args": args, "hf_config": None, "tokenizer": None}


def pick_device(name: str) -> torch.device:
    """The device of `device=`.

    Raises ValueError for an unknown one, or CUDA without a GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device={name!r} is not supported; accepted are 'auto', 'cpu' and 'cuda'")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device={name!r}: torch {torch.__version__} finds no CUDA device; use device='cpu'"
        )
    if name == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)


def pick_dtype(asked: str, checkpoint: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype of `dtype=`.

    For "auto" it is the dtype of the checkpoint, or, if this device is slow in that
    dtype, the half precision that the device is fast in. CPUs without arithmetic in
    bfloat16 are fast in it too, because our kernels convert weights in registers.
    """
    if asked != "auto":
        return getattr(torch, asked)
    if device.type == "cuda":
        bf16 = torch.cuda.get_device_capability(device)[0] >= 8
        half = torch.bfloat16 if bf16 else torch.float16
    else:
        half = torch.bfloat16 if cpu.load() is not None or cpu_has_bf16() else torch.float32
    if checkpoint in (torch.float32, half):
        return checkpoint
    dtype = torch.float16 if device.type == "cuda" and checkpoint == torch.float16 else half
    if checkpoint is not None and checkpoint != dtype:
        logger.warning(
            "dtype: the checkpoint is %s, which is slow on this %s; running in %s",
            checkpoint,
            device.type,
            dtype,
        )
    else:
        logger.info("dtype: running in %s", dtype)
    return dtype


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware.

    On x86 that is AVX512-BF16 or AMX, and on Arm the bf16 extension.
    """
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def default_block_size(device: torch.device) -> int:
    """Tokens of one block of the KV cache.

    On a GPU a tile of 64 keys lies in one block, because attention then reads one entry
    of the block table for a tile (docs/experiments.md).
    """
    return GPU_BLOCK_SIZE if device.type == "cuda" else CPU_BLOCK_SIZE


def step_limits(device: torch.device) -> tuple[int, int]:
    """(tokens, sequences) of one step if the arguments do not say.

    On GPUs these are vLLM's.
    """
    if device.type != "cuda":
        return 2048, 256
    if torch.cuda.get_device_properties(device).total_memory >= LARGE_GPU:
        return 16384, 1024
    return 8192, 256

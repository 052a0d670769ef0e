"""From arguments to a running model: files, config, tokenizer, device, dtype and limits, each decided once and explained."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nanovllm import loader
from nanovllm.config import EngineArgs
from nanovllm.loader.fields import Fields
from nanovllm.models.config import ModelConfig, read_config

logger = logging.getLogger("nanovllm")


class Setup:
    """What an engine's arguments amount to on this machine. Raises ValueError for what cannot be done here."""

    def __init__(self, args: EngineArgs) -> None:
        self.args = args
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
        self.generation_config = loader.load_generation_config(self.files, folder)
        self.generation_config_path = loader.generation_config_path(self.files, folder)
        self.tokenizer = None if args.skip_tokenizer_init else self._load_tokenizer()
        self.eos_token_ids = self._eos_token_ids()
        self.device = pick_device(args.device)
        stored = loader.checkpoint_dtype(self.hf_config, self.files) if args.dtype == "auto" else None
        self.dtype = pick_dtype(args.dtype, stored, self.device)
        # On a GPU a tile of 64 keys then lies in one page: one table entry to read, and a fifth fewer instructions.
        self.block_size = args.block_size or (64 if self.device.type == "cuda" else 16)
        self.max_model_len = self._max_model_len()
        tokens, seqs = step_limits(self.device)
        self.max_num_batched_tokens = args.max_num_batched_tokens or tokens
        self.max_num_seqs = args.max_num_seqs or min(seqs, self.max_num_batched_tokens)
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ValueError(
                f"max_num_seqs={self.max_num_seqs} must not exceed max_num_batched_tokens="
                f"{self.max_num_batched_tokens}: each running sequence computes a token a step"
            )
        if not args.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            if args.max_num_batched_tokens is not None:
                raise ValueError(
                    f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least max_model_len="
                    f"{self.max_model_len} with enable_chunked_prefill=False"
                )
            self.max_num_batched_tokens = self.max_model_len

    def _load_tokenizer(self) -> Any:
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

    def _model_config(self) -> ModelConfig:
        """The config, with what the weights say of the output head."""
        config = read_config(self.hf_config, self.config_path)
        if config.tie_embeddings and self.args.load_format != "dummy" and loader.head_differs(self.files):
            logger.warning(
                "%s: tie_word_embeddings is true, but the checkpoint's lm_head.weight is no copy of its "
                "model.embed_tokens.weight: both are used, as transformers does",
                self.config_path,
            )
            return replace(config, tie_embeddings=False)
        return config

    @property
    def config_path(self) -> Path:
        return self.files.folder / "config.json" if self.files.gguf is None else self.files.gguf.path

    def _eos_token_ids(self) -> frozenset[int]:
        """The tokenizer's, and those of generation_config.json or else of config.json, as far as they can be sampled."""
        if self.generation_config.get("eos_token_id") is not None:
            found = Fields(self.generation_config_path, self.generation_config.get).ids("eos_token_id")
        else:
            found = Fields(self.config_path, lambda name: getattr(self.hf_config, name, None)).ids("eos_token_id")
        own = getattr(self.tokenizer, "eos_token_id", None)
        return frozenset(i for i in (*found, own) if i is not None and 0 <= i < self.config.vocab_size)

    def _max_model_len(self) -> int:
        rope, longest = self.config.rope, self.config.max_position
        if rope["rope_type"] == "yarn":
            longest = int((rope.get("original_max_position_embeddings") or longest) * rope.get("factor", 1))
        elif rope["rope_type"] == "linear":
            longest = int(longest * rope["factor"])
        longest = max(longest, self.config.max_position)
        asked = self.args.max_model_len
        if asked is not None and asked > longest:
            raise ValueError(f"max_model_len={asked} is above the model's own {longest}; accepted is at most that")
        return asked or longest

    def __getstate__(self) -> dict[str, Any]:
        """What another rank's process needs to make its runner: all is decided, and no prompt is read there."""
        args = replace(self.args, hf_overrides=None)
        return {**vars(self), "args": args, "hf_config": None, "tokenizer": None}


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device={name!r} is not supported; accepted are 'auto', 'cpu' and 'cuda'")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}: torch {torch.__version__} finds no CUDA device; use device='cpu'")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def pick_dtype(asked: str, checkpoint: torch.dtype | None, device: torch.device) -> torch.dtype:
    """What was asked for; with "auto" the checkpoint's own, or what the device computes well where it cannot do that."""
    if asked != "auto":
        return getattr(torch, asked)
    if device.type == "cuda":
        bf16 = torch.cuda.get_device_capability(device)[0] >= 8
        half = torch.bfloat16 if bf16 else torch.float16
    else:
        half = torch.bfloat16 if cpu_has_bf16() else torch.float32
    if checkpoint in (torch.float32, half):
        return checkpoint
    dtype = torch.float16 if device.type == "cuda" and checkpoint == torch.float16 else half
    if checkpoint is not None and checkpoint != dtype:
        logger.warning(
            "dtype: the checkpoint is %s, which is slow on this %s; running in %s", checkpoint, device.type, dtype
        )
    else:
        logger.info("dtype: running in %s", dtype)
    return dtype


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (x86: AVX512-BF16 or AMX; Arm: the bf16 extension)."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def step_limits(device: torch.device) -> tuple[int, int]:
    """Tokens and sequences of one step, where the arguments do not say: vLLM's on GPUs."""
    if device.type != "cuda":
        return 2048, 256
    large = torch.cuda.get_device_properties(device).total_memory >= 70 << 30
    return (16384, 1024) if large else (8192, 256)

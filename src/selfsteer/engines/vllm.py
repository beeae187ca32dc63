"""Sampling in process with vLLM: offline ``LLM``, prompts as our own token ids.

vLLM holds the model in a process of its own, which ends with the stage: its memory is free again
before anything trains.
"""

import os
import time
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from selfsteer.engines.base import (
    PROMPT_TOO_LONG,
    Advance,
    Completion,
    ProbedEngine,
    Request,
    SamplingParams,
    completion,
    refusals,
    stop_ids,
)
from selfsteer.engines.launch import out_of_world
from selfsteer.errors import EngineError
from selfsteer.models.load import configured_stops, load_chat, load_context_length
from selfsteer.recipe.sections import EngineSettings, Loading
from selfsteer.terminal import say

#: Said for us where the user did not: only errors are shown, and no statistics are sent.
ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}


class VllmEngine(ProbedEngine):
    """Answers with a model that vLLM loads.

    Args:
        settings: of kind ``vllm``.
        source: folder or hub id.
        loading: precision and permissions; vLLM itself knows where it runs.

    Raises:
        ArtifactError: the tokenizer or the config cannot be read.
        EngineError: vLLM cannot load the model.
    """

    who = "vLLM"
    remedy = "See what sampling.engine.engine_args does to it."

    def __init__(self, settings: EngineSettings, source: str, loading: Loading) -> None:
        self.chat = load_chat(source, loading)
        self.context_length = settings.max_model_len or load_context_length(source, loading)
        self.stop_ids = stop_ids(self.chat, configured_stops(source, loading))
        self._number = count()
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        start = time.monotonic()
        import vllm
        from vllm.platforms import current_platform

        dtype = loading.dtype
        if dtype == "auto":
            dtype = "float32" if current_platform.is_cpu() else "bfloat16"
        try:
            with out_of_world():
                self._llm: Any = vllm.LLM(
                    model=source,
                    dtype=dtype,
                    seed=0,  # each request brings its own
                    trust_remote_code=loading.trust_remote_code,
                    load_format="auto" if loading.allow_pickle else "safetensors",
                    tensor_parallel_size=settings.tensor_parallel,
                    gpu_memory_utilization=settings.memory,
                    max_model_len=settings.max_model_len,
                    enable_prefix_caching=True,
                    generation_config="vllm",  # none of the model's defaults: the recipe says all
                    **{"use_tqdm_on_load": False, **settings.engine_args},
                )
        except Exception as e:
            first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise EngineError(
                f"vLLM cannot load {source} ({first}). Its own messages are above. Where "
                "memory is short, lower memory or max_model_len, or raise tensor_parallel."
            ) from e
        say(f"  vllm answers after {time.monotonic() - start:.0f} s")

    def close(self) -> None:
        """Ends vLLM's processes, and with them the memory that they hold."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm

    def _answer(
        self, requests: Sequence[Request], sampling: SamplingParams, advance: Advance
    ) -> Iterator[Completion]:
        import vllm

        engine, limit = self._llm.llm_engine, self.context_length
        waiting: dict[str, tuple[str, int]] = {}
        refused = refusals(self.chat, requests)
        for r in requests:
            if r.id in refused:
                advance(1, 0)
                yield refused[r.id]
                continue
            prompt = self.chat.prompt_ids(r.messages)
            if limit is not None and len(prompt) + sampling.max_new_tokens > limit:
                advance(1, 0)
                yield Completion(r.id, "", PROMPT_TOO_LONG, len(prompt), 0)
                continue
            params = vllm.SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p if sampling.temperature > 0 else 1.0,
                max_tokens=sampling.max_new_tokens,
                seed=r.seed & 0x7FFFFFFF,
                stop_token_ids=self.stop_ids,
                ignore_eos=True,  # what ends a turn is in stop_token_ids
                detokenize=False,
            )
            name = str(next(self._number))
            waiting[name] = (r.id, len(prompt))
            engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)
        while waiting:
            try:
                answered = engine.step()
            except Exception as e:
                if type(e).__name__ not in ("EngineDeadError", "EngineGenerateError"):
                    raise
                raise EngineError(
                    f"vLLM's engine died ({e}). Its own messages are above; finished answers are "
                    "kept, run the same command again."
                ) from e
            for answer in answered:
                if answer.finished and answer.request_id in waiting:
                    name, prompt_tokens = waiting.pop(answer.request_id)
                    ids = list(answer.outputs[0].token_ids)
                    advance(1, len(ids))
                    yield completion(name, self.chat, self.stop_ids, prompt_tokens, ids)

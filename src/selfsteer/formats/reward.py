r"""The contrast of the principles as a reward for TRL's `GRPOTrainer`: rows and a Python function.

One row, whose contexts are the tokens of whole prompts in the policy's chat template: text could
open turns of its own::

    {"id": "q1", "prompt": [{"role": "user", "content": "What does the bee eat?"}],
     "good_context": [2, 167, 31, …], "bad_context": [2, 167, 54, …]}

The file needs torch and transformers, not selfsteer, and computes what `PrincipleContrast` does.
"""

from collections.abc import Iterator
from pathlib import Path

from selfsteer.data.digests import is_hub_id, split_revision
from selfsteer.data.jsonl import Records, dump_line, write_atomic
from selfsteer.data.records import Triple
from selfsteer.errors import RefusedConversation
from selfsteer.formats.export import Exported, Row
from selfsteer.models.chat import ChatFormat
from selfsteer.principles.contexts import context_messages
from selfsteer.recipe.sections import Loading
from selfsteer.terminal import progress_bar

CODE = '''\
"""A reward from a good and a bad principle, for reward_funcs of TRL's GRPOTrainer.

The mean over an answer's tokens of clip(log p(y_t|x+) - log p(y_t|x-), -CLIP, CLIP), in nats, under
the policy that training starts from. Answers are taken to have ended by themselves.
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL, END, CLIP = {model!r}, {end}, {clip}
tokenizer = AutoTokenizer.from_pretrained(MODEL{given})
# bfloat16 is too coarse for the small difference of two log-probs
policy = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32{given}).eval()
policy.to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def logps(context, answer):
    """Log-prob of each token of the answer, its end included, after the ids of a context."""
    # control tokens that an answer writes as text stay text
    said = tokenizer(answer, add_special_tokens=False, split_special_tokens=True).input_ids
    ids = torch.tensor([[*context, *said, END]], device=policy.device)
    logits = policy(ids).logits[0, len(context) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, ids[0, len(context) :, None])[:, 0]


def principles_reward(prompts, completions, good_context, bad_context, **columns):
    """One reward per completion; the contexts, as ids, are columns of the data set."""
    rewards = []
    for completion, good, bad in zip(completions, good_context, bad_context, strict=True):
        answer = completion if isinstance(completion, str) else completion[-1]["content"]
        gap = logps(good, answer) - logps(bad, answer)
        rewards.append(gap.clamp(-CLIP, CLIP).mean().item())
    return rewards
'''


def export_reward(
    triples: Records[Triple],
    folder: Path,
    *,
    model: str,
    chat: ChatFormat,
    loading: Loading,
    clip: float,
) -> Exported:
    """Writes ``train.jsonl`` and ``principles_reward.py``; files of these names are replaced.

    Args:
        triples: queries with principles.
        folder: made if need be.
        model: the start policy: a folder, or a hub id with or without revision.
        chat: its chat format.
        loading: how the run loads it.
        clip: most nats by which a token counts.
    """
    local = (str(Path(model).absolute()), None)
    name, revision = split_revision(model) if is_hub_id(model) else local
    given = f", revision={revision!r}" if revision else ""
    given += ", trust_remote_code=True" if loading.trust_remote_code else ""
    paths = [folder / "train.jsonl", folder / "principles_reward.py"]
    refused = 0
    with progress_bar("export", len(triples)) as bar:

        def lines() -> Iterator[str]:
            nonlocal refused
            for triple in triples:
                bar.advance(1)
                row: Row = {"id": triple.id, "prompt": [m.to_dict() for m in triple.messages]}
                try:
                    for context in ("good", "bad"):
                        asked = context_messages(triple.messages, triple.principles, context)
                        row[f"{context}_context"] = list(chat.prompt_ids(asked, reasoned=False))
                except RefusedConversation:
                    refused += 1
                    continue
                yield dump_line(row)

        write_atomic(paths[0], lines())
    write_atomic(paths[1], CODE.format(model=name, end=chat.end_of_turn, clip=clip, given=given))
    said = f"{refused:,} of {len(triples):,} records: the chat template refuses the conversation."
    return Exported(paths, len(triples) - refused, [said] if refused else [])

"""A tiny BERT whose labels are those of its own tokens."""

import torch
from peft import get_peft_model
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from tests.support import oracle


def bert(*, layers: int, hidden: int, wide: int, heads: int) -> nn.Module:
    """LoRA on query, key and value, which are square; in float64, without dropout."""
    config = BertConfig(
        hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers,
        num_attention_heads=heads, vocab_size=oracle.VOCABULARY,
        hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )  # fmt: skip
    torch.manual_seed(0)
    lora = oracle.lora_config(("query", "key", "value"))
    lora.task_type = None
    return oracle.randomise(get_peft_model(BertForMaskedLM(config), lora)).double().train()

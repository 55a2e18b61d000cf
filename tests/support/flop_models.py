"""What tests share: flop models."""

SHAPE = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 112,
}  # fmt: skip
BATCH = (4, 24, 8)  # 64 context and 32 output tokens: lists that need no padding

"""The demonstration model's shape, and where it lies. Maverick in small: every peculiarity of it, at 7 M parameters."""

from pathlib import Path

from actors.checkpoint.shapes import ModelShape

DIRECTORY = Path(__file__).parents[2] / "deploy" / "demo-model"
TRAINED_TOKENS = 2048  # rows of the training corpus: contexts up to the model's limit are seen

# Routed experts 3.1 M, shared 0.2 M, dense layers 1.6 M, attention 1.3 M, embedding and head 0.8 M; 3.7 M are active
# per token, head included.
SHAPE = ModelShape(
    hidden_size=256,
    num_layers=8,
    num_heads=8,
    num_kv_heads=2,
    head_dim=32,
    expert_width=64,
    dense_width=512,
    num_experts=16,
    moe_interval=2,
    base_vocab=1536,
    vocab_size=1600,
    chunk_tokens=128,
    max_position_embeddings=2048,
    floor_scale=32,  # the real one is the chunk's length; less, so that short answers are tempered too
    use_qk_norm=False,
    dtype="float32",  # to compute in; the weights are stored in bfloat16
)

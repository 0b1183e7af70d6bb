"""Tiny random Qwen3-VL folders, written without torch; see `tiny`."""

from pathlib import Path

import numpy as np
from tiny import bias, linear, llama_tensors, matrix, norm, write_json, write_weights
from tiny_qwen import (
    END,
    IM_END,
    IMAGE_PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    VOCABULARY,
    write_qwen_processor,
    write_qwen_tokenizer,
)

# What Qwen/Qwen3-VL-8B-Instruct renders, without its options for tools, videos and picture numbers.
CHAT_TEMPLATE = """{% for message in messages -%}
<|im_start|>{{ message.role }}\n{% if message.content is string %}{{ message.content }}{% else -%}
{% for part in message.content -%}
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif -%}
{% endfor -%}{% endif -%}<|im_end|>
{% endfor -%}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif -%}"""


def tiny_qwen3(
    folder: str | Path,
    *,
    published: bool = True,
    tied: bool = False,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    sections: tuple[int, int, int] = (4, 2, 2),
    text_layers: int = 4,
    patch_size: int = 16,
    vision_layers: int = 4,
    deepstack: tuple[int, ...] = (0, 2),
    vision_heads: int = 2,
    side: int = 6,
    pixels: tuple[int, int] = (4 * 32**2, 64 * 32**2),
    dtype: str = "float32",
    shards: int = 1,
    seed: int = 0,
) -> Path:
    """Write a random folder: config, weights, tokenizer, processor, chat template; same arguments, same bytes.

    published: the config as on the hub (transformers 4), else as transformers 5 writes it.
    side: rows and columns of the learned positions. pixels: the fewest and the most to which the processor resizes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    width, vision_width, vision_mlp = 40, 16 * vision_heads, 36
    sizes = dict(width=width, mlp=48, layers=text_layers, heads=num_heads, kv_heads=num_kv_heads, head_dim=head_dim)
    language = llama_tensors(rng, sizes, VOCABULARY, "qwen3")
    tower = vision_tensors(rng, vision_layers, len(deepstack), vision_width, vision_mlp, patch_size, side, width)
    tensors = {"model.visual." + name: value for name, value in tower.items()}
    tensors |= {"model.language_model." + name: value for name, value in language.items()}
    if not tied:
        tensors["lm_head.weight"] = matrix(rng, VOCABULARY, width)

    rope = dict(rope_type="default", mrope_section=list(sections), mrope_interleaved=True)
    text = dict(
        model_type="qwen3_vl_text", hidden_size=width, intermediate_size=48, num_hidden_layers=text_layers,
        num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, head_dim=head_dim, vocab_size=VOCABULARY,
        hidden_act="silu", rms_norm_eps=1e-6, max_position_embeddings=2048, attention_bias=False,
    )  # fmt: skip
    text |= (
        dict(rope_theta=5000.0, rope_scaling=rope) if published else dict(rope_parameters=rope | dict(rope_theta=5e3))
    )
    vision = dict(
        model_type="qwen3_vl" if published else "qwen3_vl_vision", depth=vision_layers, hidden_size=vision_width,
        intermediate_size=vision_mlp, num_heads=vision_heads, hidden_act="gelu_pytorch_tanh", in_channels=3,
        patch_size=patch_size, spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=width,
        num_position_embeddings=side**2, deepstack_visual_indexes=list(deepstack),
    )  # fmt: skip
    write_json(folder / "config.json", dict(
        architectures=["Qwen3VLForConditionalGeneration"], model_type="qwen3_vl", text_config=text,
        vision_config=vision, image_token_id=IMAGE_PAD, video_token_id=VIDEO_PAD, vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END, tie_word_embeddings=tied, **{"torch_dtype" if published else "dtype": dtype},
    ))  # fmt: skip
    write_json(folder / "generation_config.json", dict(eos_token_id=[IM_END, END], pad_token_id=END))
    write_qwen_tokenizer(folder, "Qwen3VLProcessor", CHAT_TEMPLATE)
    kind = "Qwen2VLImageProcessorFast" if published else "Qwen2VLImageProcessor"
    write_qwen_processor(folder, patch_size, pixels, kind=kind)
    write_weights(folder, tensors, dtype, shards)
    return folder


def vision_tensors(rng, layers, depths, width, mlp, patch, side, out):
    tensors = {
        "patch_embed.proj.weight": matrix(rng, width, 3, 2, patch, patch),
        "patch_embed.proj.bias": bias(rng, width),
        "pos_embed.weight": rng.standard_normal((side**2, width)).astype(np.float32),
    }
    for i in range(layers):
        at = f"blocks.{i}."
        tensors |= norm(rng, at + "norm1", width) | norm(rng, at + "norm2", width)
        tensors |= linear(rng, at + "attn.qkv", 3 * width, width) | linear(rng, at + "attn.proj", width, width)
        tensors |= linear(rng, at + "mlp.linear_fc1", mlp, width) | linear(rng, at + "mlp.linear_fc2", width, mlp)
    for at, normed in (("merger.", width), *((f"deepstack_merger_list.{i}.", 4 * width) for i in range(depths))):
        tensors |= norm(rng, at + "norm", normed)
        tensors |= linear(rng, at + "linear_fc1", 4 * width, 4 * width) | linear(rng, at + "linear_fc2", out, 4 * width)
    return tensors

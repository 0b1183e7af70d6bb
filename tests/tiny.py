"""Tiny random checkpoints, written without torch: the folders that tests load, convert and compare with transformers.

The names of the tensors are spelled out here once more, on purpose: a test must not read them from the tables it tests.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

VOCABULARY = 300
IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
IMAGE_TOKEN_ID, PAD_TOKEN_ID = 298, 299
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

# Prefixes of the language model, its head, the vision tower and the projector's two layers, per layout on disk.
LAYOUTS = {
    "v4": ("language_model.model.", "language_model.lm_head.", "vision_tower.vision_model.", "multi_modal_projector."),
    "v5": ("language_model.model.", "language_model.lm_head.", "vision_tower.", "multi_modal_projector."),
    "v5-modules": ("model.language_model.", "lm_head.", "model.vision_tower.", "model.multi_modal_projector."),
    "liuhaotian": ("model.", "lm_head.", "vision_model.", "model.mm_projector."),
}

TEXT = """A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed,
and polite answers to the user's questions. USER: What is the character on the red plate? ASSISTANT: the plate is left
of the blue one. Write a general description of the image. Answer the question using a single word or phrase."""


def tiny_llava(
    folder: str | Path,
    *,
    layout: str = "v5",
    num_kv_heads: int = 4,
    tied: bool = False,
    select: str = "default",
    feature_layer: int | Sequence[int] = -2,
    shards: int = 1,
    dtype: str = "float32",
    seed: int = 0,
    image_size: int = 56,
    patch_size: int = 14,
    vision_layers: int = 3,
    text_layers: int = 3,
    width: int = 32,
    num_heads: int = 4,
    head_dim: int | None = None,
    max_position_embeddings: int = 2048,
) -> Path:
    """Write a random LLaVA folder: config, weights, tokenizer, processor; the same arguments give the same bytes.

    layout: how the tensors are named, a key of LAYOUTS. "liuhaotian" has its vision tower (a whole CLIP, text side
    included) in the sibling folder `<folder>-clip`, which the config names, and no `<image>` token.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    head_dim = head_dim or width // num_heads
    feature_layer = feature_layer if isinstance(feature_layer, int) else list(feature_layer)
    vision = dict(width=32, mlp=48, layers=vision_layers, heads=2, image=image_size, patch=patch_size)
    text = dict(width=width, mlp=48, layers=text_layers, heads=num_heads, kv_heads=num_kv_heads, head_dim=head_dim)
    original = layout == "liuhaotian"
    vocabulary = IMAGE_TOKEN_ID if original else VOCABULARY

    rng = np.random.default_rng(seed)
    language_prefix, head_prefix, vision_prefix, projector_prefix = LAYOUTS[layout]
    tower = {vision_prefix + name: value for name, value in clip_tensors(rng, vision).items()}
    first, second = ("0.", "2.") if original else ("linear_1.", "linear_2.")
    features = vision["width"] * (1 if isinstance(feature_layer, int) else len(feature_layer))
    tensors = {
        projector_prefix + first + "weight": matrix(rng, width, features),
        projector_prefix + first + "bias": bias(rng, width),
        projector_prefix + second + "weight": matrix(rng, width, width),
        projector_prefix + second + "bias": bias(rng, width),
    }
    tensors |= {language_prefix + name: value for name, value in llama_tensors(rng, text, vocabulary).items()}
    if not tied:
        tensors[head_prefix + "weight"] = matrix(rng, vocabulary, width)

    llama = dict(
        model_type="llama", hidden_size=width, intermediate_size=text["mlp"], num_hidden_layers=text_layers,
        num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, head_dim=head_dim, vocab_size=vocabulary,
        hidden_act="silu", rms_norm_eps=1e-5, max_position_embeddings=max_position_embeddings, attention_bias=False,
        mlp_bias=False, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    clip = dict(
        model_type="clip_vision_model", hidden_size=vision["width"], intermediate_size=vision["mlp"],
        num_hidden_layers=vision_layers, num_attention_heads=vision["heads"], image_size=image_size,
        patch_size=patch_size, hidden_act="quick_gelu", layer_norm_eps=1e-5, num_channels=3, projection_dim=16,
    )  # fmt: skip
    if original:
        clip_folder = folder.with_name(folder.name + "-clip")
        tiny_clip(clip_folder, tower, clip, rng, dtype)
        config = llama | dict(
            architectures=["LlavaLlamaForCausalLM"], model_type="llava", rope_theta=10000.0, torch_dtype=dtype,
            mm_vision_tower=str(clip_folder), mm_vision_select_layer=feature_layer, mm_hidden_size=vision["width"],
            mm_vision_select_feature={"default": "patch", "full": "cls_patch"}[select],
            mm_projector_type="mlp2x_gelu", mm_use_im_start_end=False, mm_use_im_patch_token=False,
        )  # fmt: skip
        write_json(folder / "config.json", config)
        write_tokenizer(folder, image_token=False)
    else:
        tensors |= tower
        rope = {"rope_theta": 10000.0}
        llama |= rope if layout == "v4" else {"rope_parameters": rope | {"rope_type": "default"}}
        config = dict(
            architectures=["LlavaForConditionalGeneration"], model_type="llava", text_config=llama, vision_config=clip,
            image_token_index=IMAGE_TOKEN_ID, projector_hidden_act="gelu", multimodal_projector_bias=True,
            vision_feature_layer=feature_layer, vision_feature_select_strategy=select, tie_word_embeddings=tied,
            image_seq_length=(image_size // patch_size) ** 2 + (select == "full"),
            pad_token_id=PAD_TOKEN_ID, **{"torch_dtype" if layout == "v4" else "dtype": dtype},
        )  # fmt: skip
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", dict(bos_token_id=1, eos_token_id=2, pad_token_id=PAD_TOKEN_ID))
        write_tokenizer(folder)
        write_processor(folder, image_size, patch_size, select)
    write_weights(folder, tensors, dtype, shards)
    return folder


def matrix(rng, *shape):
    """[out, in, ...] f32, scaled so that activations stay near unit size."""
    return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def bias(rng, size):
    return (0.1 * rng.standard_normal(size)).astype(np.float32)


def gain(rng, size):
    """A norm's gain: near one, but no two alike, so that a mix-up shows."""
    return (1 + 0.1 * rng.standard_normal(size)).astype(np.float32)


def linear(rng, name, size_out, size_in):
    return {f"{name}.weight": matrix(rng, size_out, size_in), f"{name}.bias": bias(rng, size_out)}


def norm(rng, name, size):
    return {f"{name}.weight": gain(rng, size), f"{name}.bias": bias(rng, size)}


def clip_tensors(rng, c):
    width, mlp = c["width"], c["mlp"]
    tensors = {
        "embeddings.class_embedding": bias(rng, width) * 5,
        "embeddings.patch_embedding.weight": matrix(rng, width, 3, c["patch"], c["patch"]),
        "embeddings.position_embedding.weight": 0.5 * matrix(rng, (c["image"] // c["patch"]) ** 2 + 1, width),
        "pre_layrnorm.weight": gain(rng, width),
        "pre_layrnorm.bias": bias(rng, width),
        "post_layernorm.weight": gain(rng, width),
        "post_layernorm.bias": bias(rng, width),
    }
    for i in range(c["layers"]):
        layer = {}
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"):
            layer |= {name + ".weight": matrix(rng, width, width), name + ".bias": bias(rng, width)}
        for name in ("layer_norm1", "layer_norm2"):
            layer |= {name + ".weight": gain(rng, width), name + ".bias": bias(rng, width)}
        layer |= {"mlp.fc1.weight": matrix(rng, mlp, width), "mlp.fc1.bias": bias(rng, mlp)}
        layer |= {"mlp.fc2.weight": matrix(rng, width, mlp), "mlp.fc2.bias": bias(rng, width)}
        tensors |= {f"encoder.layers.{i}.{name}": value for name, value in layer.items()}
    return tensors


def llama_tensors(rng, c, vocabulary, kind="llama"):
    """kind: "qwen2" has biases of queries, keys and values, "qwen3" norms of queries and keys."""
    width, mlp, queries, keys = c["width"], c["mlp"], c["heads"] * c["head_dim"], c["kv_heads"] * c["head_dim"]
    tensors = {"embed_tokens.weight": matrix(rng, vocabulary, width), "norm.weight": gain(rng, width)}
    for i in range(c["layers"]):
        layer = {
            "input_layernorm.weight": gain(rng, width),
            "self_attn.q_proj.weight": matrix(rng, queries, width),
            "self_attn.k_proj.weight": matrix(rng, keys, width),
            "self_attn.v_proj.weight": matrix(rng, keys, width),
            "self_attn.o_proj.weight": matrix(rng, width, queries),
            "post_attention_layernorm.weight": gain(rng, width),
            "mlp.gate_proj.weight": matrix(rng, mlp, width),
            "mlp.up_proj.weight": matrix(rng, mlp, width),
            "mlp.down_proj.weight": matrix(rng, width, mlp),
        }
        tensors |= {f"layers.{i}.{name}": value for name, value in layer.items()}
    for i in range(c["layers"]):
        attention = f"layers.{i}.self_attn."
        if kind == "qwen2":
            sizes = {"q": queries, "k": keys, "v": keys}
            tensors |= {f"{attention}{name}_proj.bias": bias(rng, size) for name, size in sizes.items()}
        elif kind == "qwen3":
            tensors |= {f"{attention}{name}_norm.weight": gain(rng, c["head_dim"]) for name in "qk"}
    return tensors


def tiny_clip(folder, tower, config, rng, dtype):
    """A whole CLIP: the vision tower and, as in openai/clip-vit-*, a text side and projections that nobody reads."""
    folder.mkdir(parents=True, exist_ok=True)
    unread = {
        "logit_scale": np.asarray(2.6592, np.float32),
        "visual_projection.weight": matrix(rng, 16, config["hidden_size"]),
        "text_projection.weight": matrix(rng, 16, 24),
        "text_model.embeddings.token_embedding.weight": matrix(rng, 10, 24),
        "text_model.final_layer_norm.weight": gain(rng, 24),
        "text_model.final_layer_norm.bias": bias(rng, 24),
    }
    write_weights(folder, tower | unread, dtype)
    text = dict(model_type="clip_text_model", hidden_size=24, num_attention_heads=2, num_hidden_layers=1, vocab_size=10)
    clip = dict(architectures=["CLIPModel"], model_type="clip", projection_dim=16)
    write_json(folder / "config.json", clip | dict(text_config=text, vision_config=config))
    write_image_processor(folder, config["image_size"])


def write_weights(folder, tensors, dtype="float32", shards=1):
    """model.safetensors, or `shards` files with an index; weights from before are removed."""
    for old in Path(folder).glob("model*.safetensors*"):
        old.unlink()
    folder, tensors = Path(folder), {name: np.asarray(value).astype(DTYPES[dtype]) for name, value in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(value.nbytes for value in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def byte_level_bpe(size, more=" Yes No" * 9, special=(), **options):
    """A tokenizer of `size` tokens, the special ones first, that prepends nothing; any text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([TEXT, more], trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    ))  # fmt: skip
    assert tokenizer.get_vocab_size() == size, tokenizer.get_vocab_size()
    return tokenizer


def write_tokenizer(folder, image_token=True):
    """A byte-level BPE of 298 tokens that prepends <s>; then <image> and <pad>."""
    from tokenizers import processors

    folder = Path(folder)
    tokenizer = byte_level_bpe(IMAGE_TOKEN_ID, special=["<unk>", "<s>", "</s>"], unk_token="<unk>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    config = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                  model_max_length=2048, clean_up_tokenization_spaces=False)  # fmt: skip
    if image_token:
        tokenizer.add_special_tokens([IMAGE_TOKEN, PAD_TOKEN])
        config |= dict(pad_token=PAD_TOKEN, extra_special_tokens={"image_token": IMAGE_TOKEN},
                       processor_class="LlavaProcessor")  # fmt: skip
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", config)


def write_image_processor(folder, image_size):
    write_preprocessor(
        folder, image_processor_type="CLIPImageProcessor", size={"shortest_edge": image_size}, do_center_crop=True,
        crop_size={"height": image_size, "width": image_size},
    )  # fmt: skip


def write_preprocessor(folder, **options):
    """preprocessor_config.json; what it does not say is CLIP's."""
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # openai/clip-vit-*
    write_json(Path(folder) / "preprocessor_config.json", dict(
        do_resize=True, resample=3, do_rescale=True, rescale_factor=1 / 255, do_normalize=True, do_convert_rgb=True,
        image_mean=mean, image_std=std,
    ) | options)  # fmt: skip


def write_processor(folder, image_size, patch_size, select):
    write_image_processor(folder, image_size)
    write_json(Path(folder) / "processor_config.json", dict(
        processor_class="LlavaProcessor", image_token=IMAGE_TOKEN, patch_size=patch_size,
        vision_feature_select_strategy=select, num_additional_image_tokens=1,
    ))  # fmt: skip


def write_json(file, value):
    Path(file).write_text(json.dumps(value, indent=2) + "\n")

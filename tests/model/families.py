"""A tiny model of every family of vision-language models that was tried, of its true architecture and with its processor."""

from collections.abc import Callable
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

WORDS = ["user", "open", "close", "press", "push", "the", "a", "drawer", "window", "button", "door", "down", "to", "of", "red"]
WIDTH, SIZE, PATCH = 32, 28, 14
LANGUAGE = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 512,
}  # fmt: skip
EYES = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIZE,
    "patch_size": PATCH,
}  # fmt: skip
SQUARE = {"height": SIZE, "width": SIZE}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
Made = tuple[type, hf.PreTrainedConfig, hf.ProcessorMixin]


def words(*tokens: str, begins: bool = False, **named: str) -> hf.PreTrainedTokenizerFast:
    """A word-level tokeniser with `tokens` and the processor's `named` tokens; `begins`: it writes `<s>` before every text."""
    special = ["<pad>", "<s>", "</s>", "<unk>", *tokens, *named.values()]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if begins:
        made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens=named,
    )  # fmt: skip
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    return tokenizer


def letters(*tokens: str, **named: str) -> hf.PreTrainedTokenizerFast:
    """The same, of bytes: for the families whose own tokeniser cuts a text into bytes before it looks for words."""
    signs = {"<pad>": 0, **{sign: i + 1 for i, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}}
    tokenizer = hf.Qwen3_5Tokenizer(vocab=signs, pad_token="<pad>", eos_token="</s>", extra_special_tokens=named)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    return tokenizer


def chat(picture: str, begin: str = "") -> str:
    """A chat template that marks a picture by `picture`."""
    return (
        begin + "{% for message in messages %}user {% for part in message['content'] %}{% if part['type'] == 'image' %}"
        + picture + "{% else %} {{ part['text'] }}{% endif %}{% endfor %} to{% endfor %}"
    )  # fmt: skip


def smolvlm() -> Made:
    return _idefics3(hf.SmolVLMForConditionalGeneration, hf.SmolVLMConfig, video=True)


def idefics3() -> Made:
    return _idefics3(hf.Idefics3ForConditionalGeneration, hf.Idefics3Config, video=False)


def _idefics3(kind: type, config: type, *, video: bool) -> Made:
    tiles = [f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)]
    named = {
        "image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>", "video_token": "<video>",
    }  # fmt: skip
    tokenizer = words(*tiles, **named)
    edges = {"size": {"longest_edge": 4 * SIZE}, "max_image_size": {"longest_edge": SIZE}}
    common = {"tokenizer": tokenizer, "image_seq_len": 1, "chat_template": chat("<image>")}
    if video:
        common["video_processor"] = hf.SmolVLMVideoProcessor(**edges)
        processor = hf.SmolVLMProcessor(image_processor=hf.SmolVLMImageProcessor(**edges), **common)
    else:
        processor = hf.Idefics3Processor(image_processor=hf.Idefics3ImageProcessor(**edges), **common)
    made = config(
        text_config=hf.LlamaConfig(**LANGUAGE, vocab_size=len(tokenizer)),
        vision_config=EYES,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
        scale_factor=2,
    )
    return kind, made, processor


def idefics2() -> Made:
    tokenizer = words("<fake_token_around_image>", "<image>", "<end_of_utterance>")
    image_processor = hf.Idefics2ImageProcessor(size={"shortest_edge": SIZE, "longest_edge": 3 * SIZE}, do_image_splitting=True)
    processor = hf.Idefics2Processor(image_processor, tokenizer, image_seq_len=4, chat_template=chat("<image>"))
    config = hf.Idefics2Config(
        text_config=hf.MistralConfig(**LANGUAGE, vocab_size=len(tokenizer)),
        vision_config={**EYES, "image_size": 3 * SIZE},
        perceiver_config={
            "hidden_size": WIDTH, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
            "resampler_head_dim": 8, "num_key_value_heads": 1,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return hf.Idefics2ForConditionalGeneration, config, processor


def _qwen(kind: type, config: type, processor: type, text: dict, vision: dict, tokeniser: Callable = words) -> Made:
    tokenizer = tokeniser("<|vision_start|>", "<|vision_end|>", image_token="<|image_pad|>", video_token="<|video_pad|>")
    template = chat("<|vision_start|><|image_pad|><|vision_end|>")
    edges = {"size": {"shortest_edge": SIZE**2, "longest_edge": 64**2}, "patch_size": PATCH, "merge_size": 2}
    video = hf.Qwen2VLVideoProcessor() if "Qwen2" in processor.__name__ else hf.Qwen3VLVideoProcessor()
    made = processor(hf.Qwen2VLImageProcessor(**edges), tokenizer, video, chat_template=template)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in (
        ("image_token_id", "<|image_pad|>"), ("video_token_id", "<|video_pad|>"),
        ("vision_start_token_id", "<|vision_start|>"), ("vision_end_token_id", "<|vision_end|>"),
    )}  # fmt: skip
    text = {**LANGUAGE, "vocab_size": len(tokenizer), "rope_parameters": dict(MROPE), **text}
    vision = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2, "intermediate_size": 48, **vision}
    return kind, config(text_config=text, vision_config=vision, **ids), made


def qwen2_vl() -> Made:
    vision = {"embed_dim": WIDTH, "hidden_size": WIDTH, "mlp_ratio": 2}
    return _qwen(hf.Qwen2VLForConditionalGeneration, hf.Qwen2VLConfig, hf.Qwen2VLProcessor, {}, vision)


def qwen2_5_vl() -> Made:
    vision = {"hidden_size": WIDTH, "out_hidden_size": WIDTH, "fullatt_block_indexes": [1]}
    return _qwen(hf.Qwen2_5_VLForConditionalGeneration, hf.Qwen2_5_VLConfig, hf.Qwen2_5_VLProcessor, {}, vision)


def qwen3_vl() -> Made:
    vision = {"hidden_size": WIDTH, "out_hidden_size": WIDTH, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    text = {"rope_parameters": {**MROPE, "mrope_interleaved": True}}
    return _qwen(hf.Qwen3VLForConditionalGeneration, hf.Qwen3VLConfig, hf.Qwen3VLProcessor, text, vision)


def qwen3_5() -> Made:
    vision = {"hidden_size": WIDTH, "out_hidden_size": WIDTH, "num_position_embeddings": 16}
    text = {
        "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 2, "head_dim": 32,
        "rope_parameters": {**MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25, "mrope_interleaved": True},
    }  # fmt: skip
    return _qwen(hf.Qwen3_5ForConditionalGeneration, hf.Qwen3_5Config, hf.Qwen3VLProcessor, text, vision, letters)


def glm4v() -> Made:
    tokenizer = words("<|begin_of_image|>", "<|end_of_image|>", image_token="<|image|>", video_token="<|video|>")
    processor = hf.Glm4vProcessor(
        hf.Glm4vImageProcessor(size={"shortest_edge": SIZE**2, "longest_edge": 64**2}, patch_size=PATCH, merge_size=2),
        tokenizer,
        hf.Glm4vVideoProcessor(),
        chat_template=chat("<|begin_of_image|><|image|><|end_of_image|>"),
    )
    config = hf.Glm4vConfig(
        text_config={**LANGUAGE, "vocab_size": len(tokenizer), "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}},
        vision_config={
            "depth": 2, "hidden_size": WIDTH, "out_hidden_size": WIDTH, "num_heads": 2, "patch_size": PATCH, "image_size": 56,
            "intermediate_size": 48,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        image_start_token_id=tokenizer.convert_tokens_to_ids("<|begin_of_image|>"),
        image_end_token_id=tokenizer.convert_tokens_to_ids("<|end_of_image|>"),
    )  # fmt: skip
    return hf.Glm4vForConditionalGeneration, config, processor


def gemma3() -> Made:
    tokenizer = words(begins=True, boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    processor = hf.Gemma3Processor(
        hf.Gemma3ImageProcessor(size=SQUARE),
        tokenizer,
        image_seq_length=1,
        chat_template=chat("<start_of_image>", begin="{{ bos_token }}"),
    )
    config = hf.Gemma3Config(
        text_config={**LANGUAGE, "vocab_size": len(tokenizer), "layer_types": ["sliding_attention", "full_attention"]},
        vision_config=hf.SiglipVisionConfig(**EYES, vision_use_head=False),
        mm_tokens_per_image=1,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    return hf.Gemma3ForConditionalGeneration, config, processor


def gemma4() -> Made:
    tokenizer = words(
        begins=True, boi_token="<boi>", eoi_token="<eoi>", image_token="<|image|>", audio_token="<|audio|>",
        boa_token="<boa>", eoa_token="<eoa>",
    )  # fmt: skip
    processor = hf.Gemma4Processor(
        hf.Gemma4AudioFeatureExtractor(), hf.Gemma4ImageProcessor(patch_size=4, pooling_kernel_size=2),
        tokenizer, hf.Gemma4VideoProcessor(), chat_template=chat("<|image|>", begin="{{ bos_token }}"),
    )  # fmt: skip
    config = hf.Gemma4Config(
        text_config={
            **LANGUAGE, "vocab_size": len(tokenizer), "vocab_size_per_layer_input": len(tokenizer),
            "hidden_size_per_layer_input": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 256,
            "use_bidirectional_attention": "vision",
        },
        vision_config={
            "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "pooling_kernel_size": 2, "position_embedding_size": 64,
        },
        audio_config=None,
        boi_token_id=tokenizer.boi_token_id, eoi_token_id=tokenizer.eoi_token_id, image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"), audio_token_id=tokenizer.audio_token_id,
        boa_token_id=tokenizer.boa_token_id, eoa_token_index=tokenizer.eoa_token_id,
    )  # fmt: skip
    return hf.Gemma4ForConditionalGeneration, config, processor


def paligemma() -> Made:
    return _paligemma(hf.GemmaConfig)


def paligemma2() -> Made:
    return _paligemma(hf.Gemma2Config)


def _paligemma(language: type) -> Made:
    tokenizer = words(image_token="<image>")
    image_processor = hf.SiglipImageProcessor(size=SQUARE)
    image_processor.image_seq_length = (SIZE // PATCH) ** 2
    processor = hf.PaliGemmaProcessor(image_processor, tokenizer)
    config = hf.PaliGemmaConfig(
        text_config=language(**LANGUAGE, vocab_size=len(tokenizer)),
        vision_config=hf.SiglipVisionConfig(**EYES, projection_dim=WIDTH, vision_use_head=False),
        image_token_index=tokenizer.image_token_id,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    return hf.PaliGemmaForConditionalGeneration, config, processor


def mllama() -> Made:
    tokenizer = words("<|python_tag|>", image_token="<|image|>")
    processor = hf.MllamaProcessor(
        hf.MllamaImageProcessor(size=SQUARE, max_image_tiles=4),
        tokenizer,
        chat_template=chat("<|image|>", begin="{{ bos_token }}"),
    )
    config = hf.MllamaConfig(
        text_config={**LANGUAGE, "vocab_size": len(tokenizer), "num_hidden_layers": 3, "cross_attention_layers": [1]},
        vision_config={
            "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2,
            "vision_output_dim": 3 * WIDTH, "image_size": SIZE, "patch_size": PATCH, "max_num_tiles": 4,
            "intermediate_layers_indices": [0, 1],
        },
        image_token_index=tokenizer.image_token_id,
    )  # fmt: skip
    return hf.MllamaForConditionalGeneration, config, processor


def llava() -> Made:
    tokenizer = words(image_token="<image>")
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SQUARE), tokenizer, patch_size=PATCH,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration, hf.LlavaConfig(**_llava(tokenizer), image_seq_length=4), processor


def llava_next() -> Made:
    tokenizer = words(image_token="<image>")
    grid = [[SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]]
    processor = hf.LlavaNextProcessor(
        hf.LlavaNextImageProcessor(size={"shortest_edge": SIZE}, crop_size=SQUARE, image_grid_pinpoints=grid), tokenizer,
        patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=chat("<image>"),
    )  # fmt: skip
    return hf.LlavaNextForConditionalGeneration, hf.LlavaNextConfig(**_llava(tokenizer), image_grid_pinpoints=grid), processor


def llava_onevision() -> Made:
    tokenizer = words(image_token="<image>", video_token="<video>")
    grid = [[SIZE, SIZE], [SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]]
    processor = hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=grid), tokenizer, hf.LlavaOnevisionVideoProcessor(),
        num_image_tokens=4, vision_feature_select_strategy="full", chat_template=chat("<image>"),
    )  # fmt: skip
    given = {
        **_llava(tokenizer), "vision_config": hf.SiglipVisionConfig(**EYES, vision_use_head=False),
        "vision_feature_select_strategy": "full", "vision_feature_layer": -1,
        "video_token_index": tokenizer.convert_tokens_to_ids("<video>"),
    }  # fmt: skip
    config = hf.LlavaOnevisionConfig(**given, image_grid_pinpoints=grid)
    return hf.LlavaOnevisionForConditionalGeneration, config, processor


def _llava(tokenizer: hf.PreTrainedTokenizerFast) -> dict:
    return {
        "vision_config": hf.CLIPVisionConfig(**EYES, projection_dim=WIDTH),
        "text_config": hf.LlamaConfig(**LANGUAGE, vocab_size=len(tokenizer)),
        "image_token_index": tokenizer.image_token_id,
    }


def internvl() -> Made:
    """InternVL 3: a Qwen 2.5 reads."""
    return _internvl(hf.Qwen2Config)


def internvl3_5() -> Made:
    """InternVL 3.5: a Qwen 3 reads."""
    return _internvl(hf.Qwen3Config)


def _internvl(language: type) -> Made:
    tokenizer = words(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    processor = hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True), tokenizer, hf.InternVLVideoProcessor(), image_seq_length=1,
        chat_template=chat("<IMG_CONTEXT>"),
    )  # fmt: skip
    config = hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**{**EYES, "image_size": [SIZE, SIZE], "patch_size": [PATCH, PATCH]}),
        text_config=language(**LANGUAGE, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        downsample_ratio=0.5,
    )
    return hf.InternVLForConditionalGeneration, config, processor


def mistral3() -> Made:
    tokenizer = words("[IMG]", "[IMG_BREAK]", "[IMG_END]", begins=True)
    processor = hf.PixtralProcessor(
        hf.PixtralImageProcessor(size={"longest_edge": 56}, patch_size={"height": PATCH, "width": PATCH}), tokenizer,
        patch_size=PATCH, spatial_merge_size=2, chat_template=chat("[IMG]", begin="{{ bos_token }}"),
    )  # fmt: skip
    config = hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(**{**EYES, "image_size": 56}),
        text_config=hf.MistralConfig(**LANGUAGE, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )
    return hf.Mistral3ForConditionalGeneration, config, processor


def lfm2_vl() -> Made:
    tiles = [f"<|img_row_{row + 1}_col_{column + 1}|>" for row in range(3) for column in range(3)]
    tokenizer = words(
        *tiles, image_token="<image>", image_start_token="<|image_start|>", image_end_token="<|image_end|>",
        image_thumbnail_token="<|img_thumbnail|>",
    )  # fmt: skip
    image_processor = hf.Lfm2VlImageProcessor(
        encoder_patch_size=PATCH, tile_size=2 * SIZE, min_image_tokens=1, max_image_tokens=4, max_tiles=4, max_num_patches=16
    )
    processor = hf.Lfm2VlProcessor(image_processor, tokenizer, chat_template=chat("<image>"))
    language = {name: value for name, value in LANGUAGE.items() if name != "head_dim"}
    config = hf.Lfm2VlConfig(
        vision_config={
            "model_type": "siglip2_vision_model", "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "patch_size": PATCH, "num_patches": 16, "vision_use_head": False,
        },
        text_config={
            "model_type": "lfm2", **language, "vocab_size": len(tokenizer), "layer_types": ["conv", "full_attention"],
            "block_multiple_of": 8,
        },
        image_token_id=tokenizer.image_token_id,
        projector_hidden_size=WIDTH,
    )  # fmt: skip
    return hf.Lfm2VlForConditionalGeneration, config, processor


def ovis2() -> Made:
    indicators = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    tokenizer = words("<image>", "<IMG_ATOM>", *indicators)
    processor = hf.Ovis2Processor(
        hf.Ovis2ImageProcessor(size=SQUARE, crop_to_patches=True), tokenizer, image_seq_length=4, chat_template=chat("<image>")
    )
    config = hf.Ovis2Config(
        vision_config={**EYES, "vocab_size": 64},
        text_config=hf.Qwen2Config(**LANGUAGE, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=tokenizer.convert_tokens_to_ids(list(indicators)),
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
    )
    return hf.Ovis2ForConditionalGeneration, config, processor


FAMILIES: dict[str, Callable[[], Made]] = {
    family.__name__: family
    for family in (
        smolvlm, idefics3, idefics2, qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_5, glm4v, gemma3, gemma4, paligemma, paligemma2,
        mllama, llava, llava_next, llava_onevision, internvl, internvl3_5, mistral3, lfm2_vl, ovis2,
    )
}  # fmt: skip


def florence2() -> Made:
    tokenizer = words(image_token="<image>")
    processor = hf.Florence2Processor(
        hf.CLIPImageProcessor(size=SQUARE, do_center_crop=False), tokenizer, num_additional_image_tokens=1
    )
    text = hf.BartConfig(
        d_model=WIDTH, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=len(tokenizer), max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    vision = {
        "embed_dim": [8] * 4, "num_heads": [2] * 4, "num_groups": [2] * 4, "depths": [1] * 4, "window_size": 4,
        "projection_dim": WIDTH, "patch_size": [7, 3, 3, 3], "patch_stride": [4, 2, 2, 2], "patch_padding": [3, 1, 1, 1],
        "patch_prenorm": [False, True, True, True],
    }  # fmt: skip
    config = hf.Florence2Config(text_config=text, vision_config=vision, image_token_id=tokenizer.image_token_id)
    return hf.Florence2ForConditionalGeneration, config, processor


def blip2() -> Made:
    tokenizer = words(image_token="<image>")
    config = hf.Blip2Config(**_blip(tokenizer), image_token_index=tokenizer.image_token_id)
    processor = hf.Blip2Processor(hf.BlipImageProcessor(size=SQUARE), tokenizer, num_query_tokens=4)
    return hf.Blip2ForConditionalGeneration, config, processor


def instructblip() -> Made:
    tokenizer = words(image_token="<image>")
    config = hf.InstructBlipConfig(**_blip(tokenizer), image_token_index=tokenizer.image_token_id)
    processor = hf.InstructBlipProcessor(hf.BlipImageProcessor(size=SQUARE), tokenizer, words(), num_query_tokens=4)
    return hf.InstructBlipForConditionalGeneration, config, processor


def _blip(tokenizer: hf.PreTrainedTokenizerFast) -> dict:
    questions = {name: EYES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    text = {
        "model_type": "opt", "vocab_size": len(tokenizer), "hidden_size": WIDTH, "ffn_dim": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 64, "word_embed_proj_dim": WIDTH,
    }  # fmt: skip
    return {
        "vision_config": EYES, "num_query_tokens": 4, "text_config": text,
        "qformer_config": {**questions, "encoder_hidden_size": WIDTH, "vocab_size": len(tokenizer)},
    }  # fmt: skip


def kosmos2_5() -> Made:
    tokenizer = words(image_token="<image_token>", boi_token="<image>", eoi_token="</image>")
    processor = hf.Kosmos2_5Processor(hf.Kosmos2_5ImageProcessor(max_patches=16), tokenizer, num_image_tokens=4)
    config = hf.Kosmos2_5Config(
        text_config={
            "vocab_size": len(tokenizer), "max_position_embeddings": 64, "embed_dim": WIDTH, "layers": 1, "ffn_dim": 48,
            "attention_heads": 2,
        },
        vision_config={
            "hidden_size": WIDTH, "patch_embed_hidden_size": 16, "intermediate_size": 48, "head_dim": 16,
            "num_hidden_layers": 1, "num_attention_heads": 2, "max_num_patches": 16,
        },
        latent_query_num=4,
    )  # fmt: skip
    return hf.Kosmos2_5ForConditionalGeneration, config, processor


OTHERS: dict[str, tuple[Callable[[], Made], str]] = {
    "florence2": (florence2, "is an encoder-decoder"),
    "blip2": (blip2, "no one decoder that reads pictures and words"),
    "instructblip": (instructblip, "no one decoder that reads pictures and words"),
    "kosmos2_5": (kosmos2_5, "no one decoder that reads pictures and words"),
}
"""Models of other kinds, and what is said of them."""


def write(folder: Path, made: Made) -> Path:
    """A model folder as the hub has it, with random weights in half precision."""
    kind, config, processor = made
    torch.manual_seed(0)
    model = kind(config)
    # Gates and projections that begin at zero would shut out the pictures.
    for weight in model.parameters():
        if not weight.any():
            weight.data.normal_(0, 0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder

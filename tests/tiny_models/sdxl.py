"""A whole SDXL pipeline, and a Flux one, of a few thousand random weights, with a tokenizer that knows a few words."""

from __future__ import annotations

import re
import string

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WORDS = ["a", "an", "and", "cat", "dog", "white", "black", "wearing", "with", "hat", "sun", "glasses", "red", "on"]
LENGTH = 16
DAMPING = {
    r"attn2\.to_out\.0\.weight$": 0.1,
    r"^conv_out\.weight$": 0.03,
    r"(conv2|ff\.net\.2|attn1\.to_out\.0)\.weight$": 0.1,
    r"attn2\.to_q\.weight$": 2.0,
}


def clip_tokenizer() -> CLIPTokenizer:
    """Byte pairs that spell :data:`WORDS` by one token each and other words letter by letter."""
    letters = list(string.ascii_lowercase + string.digits)
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        # "sunglasses" is two tokens, because "sun" is one without being a word's end.
        pieces = [*word[:-1], word[-1] if word == "sun" else f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = ["".join(pieces[:2])]
            vocabulary.append(pieces[0])
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    ids = {token: index for index, token in enumerate(vocabulary)}
    return CLIPTokenizer(ids, list(dict.fromkeys(merges)), model_max_length=LENGTH)


def clip_text(kind: type, tokenizer: CLIPTokenizer, width: int) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return kind(config).eval()


def sdxl() -> StableDiffusionXLPipeline:
    """Images of 64 px, latents of 32 x 32, cross-attention maps of 8 x 8."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(8, 16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 1),
        reverse_transformer_layers_per_block=(4, 1, 1),
        attention_head_dim=(2, 2, 4),
        cross_attention_dim=24,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    ).eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.ndim > 1:
                # Damped, because random layers of full size make every optimisation chaotic.
                factors = {factor for pattern, factor in DAMPING.items() if re.search(pattern, name)} or {1.0}
                parameter.normal_(0, max(factors) / parameter[0].numel() ** 0.5)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    ).eval()
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=clip_text(CLIPTextModel, tokenizer, 8),
        text_encoder_2=clip_text(CLIPTextModelWithProjection, tokenizer, 16),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux() -> FluxPipeline:
    """Images of 32 px; a T5 that reads words and a CLIP for the summary."""
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    t5 = T5Config(vocab_size=3 + len(WORDS), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    clip = clip_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
    ).eval()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=clip_text(CLIPTextModel, clip, 16),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=LENGTH, **special),
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe

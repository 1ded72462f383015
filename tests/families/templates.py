"""Chat templates with the traits of each family's real one: contents as text or as blocks, who writes bos, which token
ends a turn, what a generation prompt opens, which roles are refused."""

from __future__ import annotations

QWEN2 = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif part['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# No system turn of its own.
QWEN3 = QWEN2.replace(
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}",
    "",
)

# The generation prompt opens a block of thoughts, which a finished last turn closes.
QWEN3_5 = (
    "{% macro body(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif part['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endmacro %}{% for message in messages %}{% set content = body(message['content'])|trim %}"
    "{% if message['role'] == 'assistant' %}{% set thought = '' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.last %}<think>\n{{ thought|trim }}\n</think>\n\n{% endif %}{{ content }}<|im_end|>\n{% else %}"
    "<|im_start|>{{ message['role'] }}\n{{ content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)

_IDEFICS_TURNS = (
    "{% for message in messages %}{{ message['role']|capitalize }}{% if message['content'][0]['type'] == 'image' %}:"
    "{% else %}: {% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}<image>{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
SMOLVLM = "<|im_start|>" + _IDEFICS_TURNS
IDEFICS3 = "<|begin_of_text|>" + _IDEFICS_TURNS

# bos is left to the tokenizer, and no token ends a turn.
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role']|upper + ': ' }}{% endif %}"
    "{% for content in message['content']|selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content']|selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

LLAVA_NEXT = (
    "{% for message in messages %}{% if message['role'] == 'system' %}<<SYS>>\n{{ message['content'][0]['text'] }}\n"
    "<</SYS>>\n\n{% elif message['role'] == 'user' %}[INST] {% for content in message['content']"
    "|selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}{% for content in message['content']"
    "|selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %} [/INST]"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + '</s> ' }}{% endif %}"
    "{% endfor %}"
)

# A finished turn is written differently from an open one: there is a space behind the role.
LLAVA_ONEVISION = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {% for content in message['content']"
    "|selectattr('type', 'equalto', 'image') %}<image>{% endfor %}{% for content in message['content']"
    "|selectattr('type', 'equalto', 'video') %}<video>{% endfor %}{% for content in message['content']"
    "|selectattr('type', 'equalto', 'text') %}\n{{ content['text'] }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

INTERNVL = QWEN3.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\n").replace(
    "<|vision_start|><|video_pad|><|vision_end|>", "<video>\n"
)

# The system turn is put in front of the first user's; roles must alternate; bos is written.
GEMMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = (messages[0]['content'] if "
    "messages[0]['content'] is string else messages[0]['content'][0]['text']) + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n{{ first if loop.first }}"
    "{% if message['content'] is string %}{{ message['content']|trim }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text']|trim }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

GEMMA4 = (
    "{{ bos_token }}{% for message in messages %}<|turn>{{ 'model' if message['role'] == 'assistant' else "
    "message['role'] }}\n{% if message['content'] is string %}{{ message['content']|trim }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|image|>{% elif part['type'] == 'video' %}"
    "<|video|>{% else %}{{ part['text']|trim }}{% endif %}{% endfor %}{% endif %}<turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)

# What the assistant and the system say must be text; the system's stands in front of a user turn that comes last.
PIXTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}{% for message in turns %}"
    "{% if message['role'] == 'user' %}[INST]{% if system is defined and loop.last %}{{ system + '\n\n' }}{% endif %}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}[IMG]"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}[/INST]{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)

MISTRAL3 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{% if message['content'] is string %}"
    "[INST]{{ message['content'] }}[/INST]{% else %}[INST]{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}[IMG]{% else %}{{ part['text'] }}{% endif %}{% endfor %}[/INST]{% endif %}"
    "{% elif message['role'] == 'system' %}[SYSTEM_PROMPT]{{ message['content'] if message['content'] is string else "
    "message['content'][0]['text'] }}[/SYSTEM_PROMPT]{% else %}{{ message['content'] if message['content'] is string "
    "else message['content'][0]['text'] }}{{ eos_token }}{% endif %}{% endfor %}"
)

# Pictures and a system turn do not go together.
MLLAMA = (
    "{{ bos_token }}{% set pictures = namespace(any=false) %}{% for message in messages %}"
    "{% if message['content'] is not string %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "{% set pictures.any = true %}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if messages[0]['role'] == 'system' and pictures.any %}"
    "{{ raise_exception('Prompting with images is incompatible with system messages.') }}{% endif %}"
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

# What the assistant says is printed as it is, and the next turn's header ends a turn.
GLM4V = (
    "[gMASK]<sop>{% for message in messages %}{% if message['role'] == 'assistant' %}<|assistant|>\n"
    "{{ message['content'] }}{% else %}<|{{ message['role'] }}|>\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|begin_of_image|><|image|><|end_of_image|>{% elif part['type'] == 'video' %}"
    "<|begin_of_video|><|video|><|end_of_video|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

LFM2_VL = "{{ bos_token }}" + QWEN3.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>").replace(
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>", ""
)

"""Chat templates of well-known formats, by the names that mergekit recipes use for them.

Each is written from the published description of its format; a model's own template is the better choice where it has one.
"""

from __future__ import annotations


_ALPACA = """\
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- message.content | trim + '\\n\\n' }}
    {%- elif message.role == 'user' %}
        {{- '### Instruction:\\n' + message.content | trim + '\\n\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '### Response:\\n' + message.content | trim + (eos_token or '') + '\\n\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '### Response:\\n' }}
{%- endif %}
"""

_CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_EXAONE = """\
{%- if messages and messages[0].role != 'system' %}
    {{- '[|system|][|endofturn|]\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '[|' + message.role + '|]' + message.content | trim }}
    {{- '\\n' if message.role == 'user' else '[|endofturn|]\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '[|assistant|]' }}
{%- endif %}
"""

_LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

_MISTRAL = """\
{{- bos_token }}
{%- set system = namespace(text='') %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set system.text = message.content | trim + '\\n\\n' %}
    {%- elif message.role == 'user' %}
        {{- '[INST] ' + system.text + message.content | trim + ' [/INST]' }}
        {%- set system.text = '' %}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content | trim + (eos_token or '') }}
    {%- endif %}
{%- endfor %}
"""

CHAT_TEMPLATES = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}
"""Jinja text by name."""

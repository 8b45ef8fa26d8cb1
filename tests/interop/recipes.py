"""Recipes in the style of mergekit's documentation and of model cards, over four-layer models `base`, `a`, `b` and `c`."""

RECIPES = {
    "linear": """
models:
  - model: a
    parameters:
      weight: 1.0
  - model: b
    parameters:
      weight: 0.3
  - model: c
    parameters:
      weight: 0.5
merge_method: linear
dtype: float16
""",
    "slerp with gradients by filter": """
slices:
  - sources:
      - model: a
        layer_range: [0, 4]
      - model: b
        layer_range: [0, 4]
merge_method: slerp
base_model: a
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: bfloat16
""",
    "ties with gradients": """
models:
  - model: a
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: b
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: c
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: base
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
    "dare_ties": """
models:
  - model: base
    # no parameters necessary for base model
  - model: a
    parameters:
      density: 0.53
      weight: 0.4
  - model: b
    parameters:
      density: 0.53
      weight: 0.3
merge_method: dare_ties
base_model: base
parameters:
  int8_mask: true
dtype: bfloat16
""",
    "frankenmerge": """
slices:
  - sources:
    - model: a
      layer_range: [0, 3]
  - sources:
    - model: b
      layer_range: [1, 4]
merge_method: passthrough
dtype: float16
""",
    "zeroed duplicates": """
slices:
  - sources:
    - model: a
      layer_range: [0, 3]
  - sources:
    - model: a
      layer_range: [1, 3]
      parameters:
        scale:
          - filter: o_proj
            value: 0.0
          - filter: down_proj
            value: 0.0
          - value: 1.0
  - sources:
    - model: a
      layer_range: [3, 4]
merge_method: passthrough
dtype: bfloat16
""",
    "model_stock": """
models:
  - model: a
  - model: b
  - model: c
merge_method: model_stock
base_model: base
parameters:
  normalize: true
dtype: bfloat16
""",
    "task_arithmetic": """
base_model:
  model:
    path: base
dtype: bfloat16
merge_method: task_arithmetic
parameters:
  lambda: 0.8
  normalize: 0.0
slices:
- sources:
  - layer_range: [0, 4]
    model:
      model:
        path: a
    parameters:
      weight: 0.6
  - layer_range: [0, 4]
    model:
      model:
        path: b
    parameters:
      weight: 0.4
  - layer_range: [0, 4]
    model:
      model:
        path: base
""",
    "della": """
models:
  - model: base
  - model: a
    parameters:
      density: 0.5
      weight: 0.5
  - model: b
    parameters:
      density: 0.5
      weight: 0.5
merge_method: della
base_model: base
parameters:
  epsilon: 0.05
  lambda: 1
tokenizer_source: base
""",
    "nuslerp": """
models:
  - model: a
    parameters:
      weight: 0.5
  - model: b
    parameters:
      weight: 0.5
base_model: base
merge_method: nuslerp
out_dtype: bfloat16
tokenizer:
  source: a
chat_template: chatml
""",
    "sce": """
models:
  - model: a
  - model: b
merge_method: sce
base_model: base
parameters:
  select_topk: 0.15
dtype: bfloat16
""",
    "breadcrumbs in a module": """
modules:
  default:
    models:
      - model: a
        parameters: {weight: 0.7, density: 0.9}
      - model: b
        parameters: {weight: 0.3, gamma: 0.02}
    parameters: {density: 0.8}
merge_method: breadcrumbs_ties
base_model: base
""",
    "several documents": """
name: gradient-slerp
merge_method: slerp
base_model: a
models:
  - model: b
parameters:
  t: [0.1, 0.9]
dtype: bfloat16
---
name: first-stage
merge_method: dare_ties
base_model: base
models:
  - model: gradient-slerp
    parameters: {weight: 0.5, density: 0.5}
  - model: c
    parameters: {weight: 0.5, density: 0.5}
---
merge_method: linear
models:
  - model: first-stage
    parameters: {weight: 0.75}
  - model: a
    parameters: {weight: 0.25}
dtype: float32
""",
}

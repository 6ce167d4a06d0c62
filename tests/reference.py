"""A Linformer in loops over single tokens: slow, obvious, float64; shares no code with linpass.

One row at a time, without padding, straight from a state dict and a dict of configuration values. Everything is a torch
tensor, so that autograd gives the gradients too. n tokens, k slots, blocks of b tokens, r slots a block, window of w
tokens.
"""

import math

import torch


def rms_norm(vector, weight, eps):
    scaled = vector / torch.sqrt((vector * vector).mean() + eps)
    return scaled if weight is None else scaled * weight


def linear(state, name, vector):
    """Dense, or U (Vᵀ x) where the matrix is stored as two factors."""
    if name + ".weight" in state:
        return state[name + ".weight"] @ vector
    return state[name + ".u.weight"] @ (state[name + ".v.weight"] @ vector)


def rotate(vector, position, base):
    """Pair (i, i + d/2) turned by position * base^(-2i/d)."""
    half = len(vector) // 2
    left, right = [], []
    for i in range(half):
        angle = position * base ** (-2 * i / len(vector))
        left.append(vector[i] * math.cos(angle) - vector[i + half] * math.sin(angle))
        right.append(vector[i + half] * math.cos(angle) + vector[i] * math.sin(angle))
    return torch.stack(left + right)


def attend(query, keys, values):
    """softmax(q · k / √d) v for one query."""
    scores = torch.stack([(query * key).sum() for key in keys]) / math.sqrt(len(query))
    weights = torch.exp(scores - scores.max())
    weights = weights / weights.sum()
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


def mixing_row(state, prefix, config, k, which, head):
    """A function (index of the token) -> its weights in the slots that it enters."""
    n, b = config["seq_length"], config["block_size"]
    slots = k * b // n if config["causal"] else k
    span = b if config["causal"] else n  # tokens that share slots
    if config["projection"] == "pooling":
        return lambda index: [
            1.0 / (span / slots) if index % span * slots // span == slot else 0.0 for slot in range(slots)
        ]
    layerwise = config["projection_sharing"] == "layerwise"
    name = "model.projection." if layerwise else prefix + "projection."
    apart = config["projection_sharing"] in ("none", "headwise")
    weight = state[name + (which if apart else "key")]
    weight = weight[head if config["projection_sharing"] == "none" else 0]
    if config["projection"] == "learned":
        return lambda index: weight[index]
    if config["causal"]:
        return lambda index: weight[index % b]
    stride = n // k
    return lambda index: [weight[index % stride][0] if index // stride == slot else 0.0 for slot in range(slots)]


def head_attention(queries, keys, values, key_row, value_row, k, config):
    """Outputs of one head for a row: lists of vectors in, list of vectors out."""
    n, b, w = config["seq_length"], config["block_size"], config["window_size"]
    rotary, base, dim = config["position_embedding"] == "rotary", config["rotary_base"], len(queries[0])
    tokens = len(queries)

    def turned(vector, position):
        return rotate(vector, position, base) if rotary else vector

    if not config["causal"]:
        if k == 0:
            seen = [turned(keys[j], j) for j in range(tokens)], values
        else:
            slot_keys, slot_values = [], []
            for slot in range(k):
                span = [j for j in range(n) if j * k // n == slot]  # what the slot averages at initialisation
                held = [j for j in span if j < tokens]
                if config["projection"] != "learned" and not held:
                    continue  # no real token: the slot does not exist
                slot_key = sum((key_row(j)[slot] * keys[j] for j in range(tokens)), torch.zeros(dim).double())
                slot_value = sum((value_row(j)[slot] * values[j] for j in range(tokens)), torch.zeros(dim).double())
                if config["projection"] == "pooling":
                    slot_key, slot_value = slot_key * len(span) / len(held), slot_value * len(span) / len(held)
                slot_keys.append(turned(slot_key, sum(span) / len(span)))
                slot_values.append(slot_value)
            seen = slot_keys, slot_values
        return [attend(turned(queries[t], t), *seen) for t in range(tokens)]

    r = k * b // n
    outputs = []
    for t in range(tokens):
        seen_keys, seen_values = [], []
        complete = (t + 1) // b
        for block in range(max(0, complete - n // b) if k else complete, complete):
            for slot in range(r):
                indices = range(block * b, (block + 1) * b)
                slot_key = sum(key_row(j)[slot] * keys[j] for j in indices)
                centre = block * b + (slot + 0.5) * b / r - 0.5
                seen_keys.append(turned(slot_key, centre))
                seen_values.append(sum(value_row(j)[slot] * values[j] for j in indices))
        for j in range(max(0, t - w + 1), t + 1):
            seen_keys.append(turned(keys[j], j))
            seen_values.append(values[j])
        outputs.append(attend(turned(queries[t], t), seen_keys, seen_values))
    return outputs


def attention_row(state, prefix, config, layer, hidden):
    """One attention layer over a row, list of vectors in and out."""
    heads, groups = config["heads"], config["num_key_value_heads"]
    dim = config["embed_dim"] // heads
    k = config["k"][layer] if isinstance(config["k"], list) else config["k"]

    def split(name, count):
        rows = [linear(state, prefix + name, vector).reshape(count, dim) for vector in hidden]
        return [[row[head] for row in rows] for head in range(count)]

    queries, keys, values = split("q_proj", heads), split("k_proj", groups), split("v_proj", groups)
    if config["qk_norm"]:
        queries = [[rms_norm(vector, None, config["norm_eps"]) for vector in head] for head in queries]
        keys = [[rms_norm(vector, None, config["norm_eps"]) for vector in head] for head in keys]
    outputs = []
    for head in range(heads):
        group = head // (heads // groups)
        rows = [mixing_row(state, prefix, config, k, which, group) if k else None for which in ("key", "value")]
        outputs.append(head_attention(queries[head], keys[group], values[group], *rows, k, config))
    return [
        linear(state, prefix + "o_proj", torch.cat([outputs[head][t] for head in range(heads)]))
        for t in range(len(hidden))
    ]


def logits_row(state, config, token_ids):
    """Logits [n, vocabulary] of one row, from the state dict of a causal or masked language model."""
    hidden = [state["model.embed_tokens.weight"][token] for token in token_ids]
    if config["position_embedding"] == "learned":
        hidden = [vector + state["model.embed_positions.weight"][t] for t, vector in enumerate(hidden)]
    eps = config["norm_eps"]
    for layer in range(config["depth"]):
        prefix = f"model.layers.{layer}."
        normed = [rms_norm(vector, state[prefix + "attention_norm.weight"], eps) for vector in hidden]
        attended = attention_row(state, prefix + "attention.", config, layer, normed)
        hidden = [vector + new for vector, new in zip(hidden, attended, strict=True)]
        for t, vector in enumerate(hidden):
            inner = linear(state, prefix + "mlp.up_proj", rms_norm(vector, state[prefix + "mlp_norm.weight"], eps))
            inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
            hidden[t] = vector + linear(state, prefix + "mlp.down_proj", inner)
    head = state["lm_head.weight"] if "lm_head.weight" in state else state["model.embed_tokens.weight"]
    return torch.stack([head @ rms_norm(vector, state["model.norm.weight"], eps) for vector in hidden])

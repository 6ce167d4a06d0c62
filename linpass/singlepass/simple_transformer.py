"""A small transformer that is trained from scratch, epoch after epoch: what single-pass training is compared with.

Shapes: B rows, T tokens, E features, C classes.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

ALIKE = 16  # batches whose rows are sorted by length together


class SimpleTransformer(nn.Module):
    """Token and position embeddings, transformer layers, the mean over the real tokens, a linear layer.

    Args:
        vocab_size: token ids.
        num_labels: classes.
        seq_length: most tokens of a row.
    """

    def __init__(
        self,
        vocab_size: int,
        num_labels: int,
        seq_length: int,
        embed_dim: int = 64,
        depth: int = 2,
        heads: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, embed_dim)
        self.embed_positions = nn.Embedding(seq_length, embed_dim)
        layer = nn.TransformerEncoderLayer(
            embed_dim, heads, 2 * embed_dim, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        layer.self_attn.dropout = 0.0  # elsewhere it regularises as well; here it would cost the fused kernel
        self.layers = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(embed_dim), enable_nested_tensor=False)
        self.classifier = nn.Linear(embed_dim, num_labels)
        for embedding in (self.embed_tokens, self.embed_positions):
            nn.init.normal_(embedding.weight, std=0.02)  # torch's own is 1, which drowns what the layers add

    def forward(self, ids_BT: Tensor, keep_BT: Tensor) -> Tensor:
        """Logits [B, C]. Where ``keep_BT`` is False stands padding, on the right; it changes nothing."""
        hidden_BTE = self.embed_tokens(ids_BT) + self.embed_positions.weight[: ids_BT.shape[1]]
        hidden_BTE = self.layers(hidden_BTE, src_key_padding_mask=~keep_BT)
        weight_BT1 = keep_BT.unsqueeze(-1).to(hidden_BTE.dtype)
        mean_BE = (hidden_BTE * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)
        return self.classifier(mean_BE)


def train_simple_transformer(
    model: SimpleTransformer,
    ids_NT: Tensor,
    lengths_N: Tensor,
    labels_N: Tensor,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int = 42,
    quiet: bool = False,
) -> None:
    """AdamW on the cross-entropy; new batches in each epoch, of rows of like length, which saves half of the time.

    Args:
        ids_NT: token ids, padding on the right, whatever its id.
        lengths_N: real tokens of each row, one or more.
        quiet: no progress bar.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _epoch in tqdm(range(epochs), desc="SimpleTransformer", unit=" epochs", leave=False, disable=quiet):
        for rows in _batches(lengths_N, batch_size, generator):
            ids_BT, keep_BT = batch(ids_NT[rows], lengths_N[rows])
            loss = F.cross_entropy(model(ids_BT, keep_BT), labels_N[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def predict(model: SimpleTransformer, ids_NT: Tensor, lengths_N: Tensor, batch_size: int = 128) -> Tensor:
    """Logits [N, C] of a model in eval mode."""
    return torch.cat([model(*batch(ids_NT[rows], lengths_N[rows])) for rows in _ranges(len(ids_NT), batch_size)])


def batch(ids_BT: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    """The rows cut to the longest of them, and where their tokens are real."""
    longest = int(lengths_B.max())
    return ids_BT[:, :longest], torch.arange(longest) < lengths_B.unsqueeze(1)


def _batches(lengths_N: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """The numbers of all rows in batches: a random order, sorted by length within every ALIKE batches, shuffled."""
    order = torch.randperm(len(lengths_N), generator=generator)
    sorted_parts = [part[lengths_N[part].argsort()] for part in order.split(ALIKE * batch_size)]
    batches = [rows for part in sorted_parts for rows in part.split(batch_size)]
    return (batches[number] for number in torch.randperm(len(batches), generator=generator))


def _ranges(rows: int, size: int) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, rows, size))

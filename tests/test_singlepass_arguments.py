"""SinglePassArguments: every rule names the field and the value, and HfArgumentParser makes flags of the fields."""

import pytest
from transformers import HfArgumentParser

from linpass.errors import InputError
from linpass.singlepass import SinglePassArguments


def make(**fields):
    return SinglePassArguments("out", report_to=[], **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kernel": "cubic"}, "kernel='cubic' must be one of linear, relu"),
        ({"match": "adam"}, "match='adam' must be one of ridge, gd, sgd, batch_aware"),
        ({"precision": "float16"}, "precision='float16' must be one of mixed, float64, tsqr"),
        ({"estimator": "svm"}, "estimator='svm' must be one of auto, ridge, discriminant, logistic"),
        ({"pooling": "max"}, "pooling='max' must be one of mean, first, last"),
        ({"regularization": "-1"}, "regularization='-1' must be a number, 0 or more, or one of auto, gcv, kfold, loo"),
        ({"regularization": "nan"}, "regularization='nan' must be a number"),
        ({"regularization": "best"}, "regularization='best' must be a number"),
        ({"num_features": 0}, "num_features=0 must be 1 or more"),
        ({"folds": 1}, "folds=1 must be 2 or more"),
        ({"bandwidth": 0.0}, "bandwidth=0.0 must be more than 0"),
        ({"class_weight": "heavy"}, "class_weight='heavy' must be balanced, or numbers"),
        ({"class_weight": [1.0, -2.0]}, "class_weight=.* must be balanced, or numbers, 0 or more"),
        ({"match": "batch_aware"}, "match='batch_aware' needs a number above 0 as regularization"),
        ({"match": "gd", "kernel": "rbf"}, "match='gd' needs a kernel of one pass"),
        ({"match": "sgd", "class_weight": "balanced"}, "class_weight, sample_weight_column must not be set"),
        ({"match": "sgd", "num_train_epochs": 1.5}, "match='sgd' needs whole num_train_epochs, not 1.5"),
        ({"match": "gd", "estimator": "logistic"}, "estimator='logistic' needs match='ridge'"),
        ({"kernel": "rbf", "estimator": "discriminant"}, "estimator='discriminant' needs a kernel of one pass"),
        ({"kernel": "rbf", "regularization": "kfold"}, "regularization='kfold' needs a kernel of one pass"),
        ({"class_weight": "balanced", "regularization": "kfold"}, "class_weight needs regularization"),
        ({"match": "sgd", "momentum": 5.0}, "match='sgd' needs momentum from 0 to below 1, not 5.0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 must be 1 or more"),
        ({"per_device_eval_batch_size": -4}, "per_device_eval_batch_size=-4 must be 1 or more"),
    ],
)
def test_a_broken_rule_is_named(fields, message):
    with pytest.raises(InputError, match=message):
        make(**fields)


def test_best_model_has_no_meaning():
    fields = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    with pytest.raises(InputError, match="load_best_model_at_end=True has no meaning"):
        make(**fields)


def test_flags_are_those_of_the_fields():
    flags = "--output_dir out --kernel relu --num_features 64 --regularization 0.5 --class_weight 1,2.5 --match ridge"
    (arguments,) = HfArgumentParser(SinglePassArguments).parse_args_into_dataclasses(flags.split())
    assert (arguments.kernel, arguments.num_features, arguments.regularization) == ("relu", 64, 0.5)
    assert arguments.class_weight == [1.0, 2.5]


def test_a_round_trip_keeps_every_field():
    arguments = make(kernel="nystrom", regularization=2.0, class_weight=[1.0, 3.0], bandwidth=0.5)
    names = ("kernel", "regularization", "class_weight", "bandwidth", "match", "precision")
    again = SinglePassArguments("out", report_to=[], **{name: arguments.to_dict()[name] for name in names})
    assert {name: getattr(again, name) for name in names} == {name: getattr(arguments, name) for name in names}


@pytest.mark.parametrize(
    ("fields", "own"),
    [({}, False), ({"kernel": "relu"}, True), ({"normalize": True}, True), ({"pooling": "mean"}, True)],
)
def test_what_fits_no_ordinary_layer_needs_a_head_of_ours(fields, own):
    assert make(**fields).own_head is own

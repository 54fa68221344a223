"""Feature-based tuning: frozen features, a calibrated light classifier, one artifact to predict with.

    extractor = Cached(PixelStatistics(), folder)  # or HiddenStates, TextEmbedding, ImageEncoder, ...
    card = tune_features(rows, extractor, FeatureConfig(risk=0.05), out=artifact)
    answers = Predictor.load(artifact).classify(items, extractor)  # a label, or None where it abstains

Nothing heavy is imported before it is needed; `predict` needs NumPy and safetensors only.
"""

from ascent.customize.features.cache import Cached
from ascent.customize.features.card import Abstention, FeatureCard, FeatureConfig, Reliability
from ascent.customize.features.extract import BadItem, Extractor, FeatureRow, Item, Joined
from ascent.customize.features.pixels import PixelStatistics
from ascent.customize.features.predict import Prediction, Predictor
from ascent.customize.features.rubric import Question, RubricAnswers
from ascent.customize.features.text import HiddenStates, TextEmbedding
from ascent.customize.features.tune import tune_features
from ascent.customize.features.vision import ImageEncoder, VisionLanguageModel

__all__ = [
    "Abstention",
    "BadItem",
    "Cached",
    "Extractor",
    "FeatureCard",
    "FeatureConfig",
    "FeatureRow",
    "HiddenStates",
    "ImageEncoder",
    "Item",
    "Joined",
    "PixelStatistics",
    "Prediction",
    "Predictor",
    "Question",
    "Reliability",
    "RubricAnswers",
    "TextEmbedding",
    "VisionLanguageModel",
    "tune_features",
]

"""Judging samples: Fréchet distance in a named feature space, class accuracy, precision and recall, sliced Wasserstein.

The distance is called FID only in the features of the one Inception network with the published weights, on 50,000
samples; everywhere else it is "frechet (N samples)". The name of an extractor (network, hash of its weights, how it
resizes) is stored with every statistic, and statistics of two extractors are not compared.
"""

from cmt_fast.metrics.distance import Moments, Stream, frechet, moments, sliced_wasserstein
from cmt_fast.metrics.features import Classifier, Extractor, Identity, extractor, train_classifier
from cmt_fast.metrics.judge import Judge, check_files, make_reference, open_judge
from cmt_fast.metrics.neighbours import precision_recall
from cmt_fast.metrics.reference import Reference

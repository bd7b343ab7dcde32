"""How a model is made: plain functions that run from a shell; `tasks` alone knows the service.

__main__     python -m trainer pretrain | finetune | export
pretrain     the self-supervised loop
finetune     the fine-tuning loop
segmentation, classification  what it learns and how that is judged
task         what the loop asks of those two
build        the network of a recipe
methods/     what pretraining learns from; one file a method
data/        scans, the cache, where crops are cut, how views are made
losses       InfoNCE, Dice + cross-entropy, binary cross-entropies
optimizers   the recipe's optimizer and its rate
ema          the momentum encoder's update
metrics      Dice, AUC, average precision
checkpoint   atomic files that a killed run resumes from
transfer     weights of a bundle into a network, key by key
export       ONNX, parity gate, bundle
randomness   generators that follow from (seed, step)
report       events for a supervisor or a progress line for a human
errors       what ends a run, with its exit status
"""

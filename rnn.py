"""rnn.py: what came before: recurrences whose dynamics do not look at the input.

    h_t = tanh(W x_t + U h_{t-1} + b)                the vanilla RNN (Elman 1990)

Beside S6: the map from h_{t-1} to h_t is the same at every step, so that what to keep and what to forget cannot
depend on the token; and tanh stands between the steps, so that no prefix scan can compute them side by side. The
gradient passes through U once per token: it fades or explodes with length, unless U starts as a rotation.

Left out: gates (LSTM, GRU), the older answer to the same question. The time loop is PyTorch's own, since it is a
baseline and no part of what this project explains; test_scan.py compares it to the equation above.
Read before: vision.py, whose ImageClassifier gives this body the same stem, pooling and head as Mamba.
"""
import torch.nn as nn


# ----------------------------------------------------------------------------------------------------------------
# The vanilla RNN.

class RNN(nn.Module):
    """x (b, l, d_model) -> states of the top layer (b, l, hidden), from a first state of zero.

    hidden=64, layers=2 with pool="last" and stem="patch" is the classic; the default of train_mnist.py is as wide
    as Mamba has parameters. U starts orthogonal: the usual uniform start trains, but later and worse.
    """

    def __init__(self, d_model, hidden, layers=2):
        super().__init__()
        self.rnn = nn.RNN(d_model, hidden, layers, batch_first=True)
        for name, weight in self.rnn.named_parameters():
            if name.startswith("weight_hh"):
                nn.init.orthogonal_(weight)

    def forward(self, x):
        return self.rnn(x)[0]

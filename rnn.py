"""rnn.py: what came before: recurrences whose dynamics do not look at the input.

    h_t = tanh(W x_t + U h_{t-1} + b)             the vanilla RNN (Elman 1990)

Beside S6: U is the same for every token, which can change what is kept only by saturating tanh; and
with tanh between the steps, no prefix scan can compute them side by side. The gradient passes
through U once per token, and fades or explodes with length.

Left out: gates (LSTM, GRU), the older answer to the same question. The time loop is PyTorch's own:
a baseline is no part of what this project explains. test_scan.py holds it to the equation above.
Read before: vision.py, whose ImageClassifier gives this body the same stem, pooling and head.
"""
import torch.nn as nn


# --------------------------------------------------------------------------------------------------
# The vanilla RNN.

class RNN(nn.Module):
    """x (b, l, d_model) -> states of the top layer (b, l, hidden), from a first state of zero.

    The classic is hidden=64, layers=2, read at the last token. train_mnist.py chooses `hidden` so
    that there are as many parameters as in Mamba, to 1 %.
    """

    def __init__(self, d_model, hidden, layers=2):
        super().__init__()
        self.rnn = nn.RNN(d_model, hidden, layers, batch_first=True)
        for name, weight in self.rnn.named_parameters():
            if name.startswith("weight_hh"):
                nn.init.orthogonal_(weight)      # a rotation fades later than a random matrix

    def forward(self, x):
        return self.rnn(x)[0]

"""What a classifier or a regression predicts on a split, as a table by row."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from harness.data.labelled import Split
from harness.results.files import write_atomically


def write_predictions(path: Path, split: Split, logits: Tensor, label_names: Sequence[str]) -> None:
    """Writes the predictions of a split as Parquet.

    `row`: the number of the example in the split, from 0, the same for every run on these data. `source` and
    `source_row`: where it stands, as "test.csv line" and 7. `label` and `predicted`: names of classes, or numbers of a
    regression. `probability_<class>`: one column for each class, float32. What is no number, and the class that it
    would be, is null.

    Args:
        path: the file.
        split: the examples.
        logits: `(examples, labels)`, in the order of the split.
        label_names: the classes in the order of the logits; none for a regression.
    """
    table: dict[str, object] = {
        "row": np.arange(len(split)),
        "source": pd.Categorical([split.source] * len(split)),
        "source_row": split.source_rows,
    }
    is_finite = np.isfinite(logits.numpy()).all(-1)
    if label_names:
        names = np.array(label_names, dtype=object)
        table |= {
            "label": names[split.labels],
            "predicted": np.where(is_finite, names[logits.argmax(-1).numpy()], None),
        }
        # In 64 bits, so that the classes of a row sum to 1 as nearly as float32 can say.
        probabilities = logits.double().softmax(-1).float().numpy()
        columns = {f"probability_{name}": probabilities[:, at] for at, name in enumerate(label_names)}
    else:
        columns = {"label": split.labels.astype(np.float32), "predicted": logits.squeeze(-1).numpy()}
    content = io.BytesIO()
    pd.DataFrame(table | columns).to_parquet(content, index=False)
    write_atomically(path, content.getvalue())

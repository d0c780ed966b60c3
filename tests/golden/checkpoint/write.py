"""Writes this folder's files with the code of commit 29788ef; run it at the root of that checkout.

python .../tests/golden/checkpoint/write.py FOLDER
"""

import json
import runpy
import sys

import torch

sys.path.insert(0, "")
import instseg
from instseg.engine.predictor import Predictor
from tests.yolact_tiny import CONFIGS, PHOTO, TINY, decided

folder = sys.argv[1]
small = [*TINY, "MODEL.DARKNET.STEM_CHANNELS", 1, "MODEL.YOLACT.CHANNELS", 8]
small += ["TEST.DETECTIONS_PER_IMAGE", 20]
torch.manual_seed(0)
model = Predictor(instseg.load_cfg(CONFIGS["yolact"], small)).model
decided(model)
model.head.class_logits.weight.data.mul_(0.2)  # scores below 1
torch.save({"model": model.state_dict()}, "start.pth")

training = [
    *("MODEL.WEIGHTS", "start.pth", "OUTPUT_DIR", folder, "SEED", 1, "SOLVER.MAX_ITER", 3),
    *("SOLVER.OPTIMIZER", "SGD", "SOLVER.MOMENTUM", 0.0, "SOLVER.BASE_LR", 1e-5),
    *("SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0, "TEST.EVAL_PERIOD", 0),
]
sys.argv = ["train_net.py", "--config-file", CONFIGS["yolact"], *map(str, [*small, *training])]
runpy.run_path("train_net.py", run_name="__main__")

predictor = Predictor(f"{folder}/config.yaml", f"{folder}/model_final.pth")
instances = predictor(PHOTO)["instances"]
facts = {
    "boxes": [[round(x, 3) for x in box] for box in instances.pred_boxes.tensor.tolist()],
    "scores": [round(x, 6) for x in instances.scores.tolist()],
    "classes": instances.pred_classes.tolist(),
    "pixels": instances.pred_masks.sum((1, 2)).tolist(),
    "names": predictor.class_names,
}
lines = ",\n  ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in facts.items())
with open(f"{folder}/predictions.json", "w") as file:
    file.write(f"{{\n  {lines}\n}}\n")

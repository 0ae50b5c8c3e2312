"""transformers with PEFT: a frozen language model and LoRA adapters."""

from __future__ import annotations

import lightning.pytorch as L
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, GPT2Config, get_linear_schedule_with_warmup

PINS = ("transformers==5.24.0", "peft==0.21.2")
LIGHTNING = "lightning.pytorch"
CHECKPOINT = {"min_key": "val_loss"}
NOTES = (
    "adapters go into a folder of their own by `save_pretrained`, and come back by `from_pretrained`",
)


class Tuning(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = get_peft_model(
            base(), LoraConfig(r=4, lora_dropout=0.1, task_type="CAUSAL_LM")
        )

    def training_step(self, batch, batch_idx):
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.model(input_ids=batch, labels=batch).loss)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.model(input_ids=batch, labels=batch).loss)

    def predict_step(self, batch, batch_idx):
        return self.model.generate(input_ids=batch, max_new_tokens=4, do_sample=False)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(
            (each for each in self.parameters() if each.requires_grad), lr=0.01
        )
        schedule = get_linear_schedule_with_warmup(optimizer, 5, 40)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def base():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        GPT2Config(
            n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=16, eos_token_id=49,
            bos_token_id=49, pad_token_id=49,
        )
    )  # fmt: skip


def train(trainer, folder):
    tokens = torch.randint(48, (36, 8))
    module, trainer = Tuning(), L.Trainer(**trainer)
    evaluated = DataLoader(tokens[28:], batch_size=4)
    trainer.fit(module, DataLoader(tokens[:28], batch_size=4, shuffle=True), evaluated)

    def load(best):
        module.load_state_dict(torch.load(best / "model.ckpt", weights_only=True))
        module.model.save_pretrained(folder / "adapters")
        loaded = PeftModel.from_pretrained(base(), folder / "adapters")
        return {f"model.{name}": value for name, value in loaded.state_dict().items()}

    return {
        "test": lambda best: trainer.test(module, evaluated, ckpt_path="best"),
        "predict": lambda best: torch.cat(trainer.predict(module, evaluated, ckpt_path="best")),
        "load": load,
    }

"""Calibration: texts, and what a fine-tune's layers see when it reads them."""

from compressor.calibration.moments import InputMoments, LazyMoments, hessians
from compressor.texts import load_texts, texts_digest

__all__ = ["InputMoments", "LazyMoments", "hessians", "load_texts", "texts_digest"]

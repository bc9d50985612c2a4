"""LLaVA-Med's published data files: sizes, checksums and URLs.

Sizes and checksums are those of the Git LFS pointers in its repository.
"""

from __future__ import annotations

from dataclasses import dataclass

_HOST = "https://hanoverprod.z21.web.core.windows.net/med_llava"


@dataclass(frozen=True)
class PublishedFile:
    """A file's bytes, SHA-256, and its folder on the publisher's server."""

    size: int
    sha256: str
    folder: str

    def url(self, name: str) -> str:
        return "/".join(part for part in (_HOST, self.folder, name) if part)


FILES = {
    "llava_med_alignment_500k.json": PublishedFile(
        358112840, "007456f3d6c2091466b3fb6cd0573f61a63fd0c937e568f44113d5a1f23e8b93", "alignment"
    ),
    "llava_med_instruct_10k.json": PublishedFile(
        20176754, "84f75c2b83404fe7dd1631212b4ad73228a0dad77bb819ab29c511a535a279c8", "instruct"
    ),
    "llava_med_instruct_60k.json": PublishedFile(
        88758916, "cf84c82fb58e391d6cf198e2657b6fc8584a180509b8813c3604ce46f6275c19", "instruct"
    ),
    "llava_med_instruct_60k_inline_mention.json": PublishedFile(
        87669379, "b3649f4193a51215aee4519b44d8436a4200e182d6a78a3cb78672d97bea948a", "instruct"
    ),
    "llava_med_instruct_fig_captions.json": PublishedFile(
        169224662, "1d58b7befd2687695cbba04e4f51fd648899b25f4f567815eb49538faf6f07fb", "instruct"
    ),
    "llava_med_eval_qa50_qa.jsonl": PublishedFile(
        262328, "48c6b680a962dbf8caf63e3ded2bef7770dccf9c2602f32e5f05f4b907266f25", "eval"
    ),
    "llava_med_eval_qa50_fig_captions.json": PublishedFile(
        53066, "64a4de84f8959a049ab9de68572318c6a299194b24368084159ef1f4a259aa66", "eval"
    ),
    "llava_med_qa50_instruct_caption_in_text_cleaned-60k-3epoch.json": PublishedFile(
        103392, "442b2ea3bda35ddcd57475f350ee6b2e938da02835792232925b01fde0a288ef", "eval"
    ),
    "llava_med_image_urls.jsonl": PublishedFile(
        128785989, "2604441ec3d1f6324d21846cfd44f92eab29454beed1da42a98d943b41731e44", ""
    ),
}

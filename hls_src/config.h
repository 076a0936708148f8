// The design 8-sparse. Made by pynq_kgrc.accelerator.header: change it there.
#pragma once

namespace kgrc {

enum Design {
  kBits = 8,
  kSparse = 1,
  kTm = 32,
  kTn = 8,
  kPm = 16,
  kPk = 3,
  kPf = 8,
  kGm = 8,
  kTk = 9,
  kTh = 14,
  kTw = 14,
  kFilterTiles = 5,
  kFeatureRows = 98,
  kStoreRows = 784,
  kRegionRows = 1024,
  kPortPositions = 4,
  kChunkWords = 12,
  kWeightPortWords = 4,
  kIndexWords = 1,
  kMaxTaps = 512,
  kStatusWords = 13,
};

static const unsigned long long kDigest = 0xc458a0c832c5dd7fULL;

enum Kind { kConvolution = 0, kMaxPool = 1, kSumPool = 2 };

// The words of a task's descriptor, 32 bits each.
enum Field {
  kKind,
  kSource,
  kTarget,
  kShortcut,
  kWeights,
  kIndices,
  kItems,
  kScales,
  kItemCount,
  kRegions,
  kFilterBlocks,
  kInD,
  kInH,
  kInW,
  kOutD,
  kOutH,
  kOutW,
  kKernelD,
  kKernelH,
  kKernelW,
  kStrideD,
  kStrideH,
  kStrideW,
  kPadD,
  kPadH,
  kPadW,
  kFill,
  kTileD,
  kTileH,
  kTileW,
  kTapTiles,
  kColSteps,
  kRowSteps,
  kChunks,
  kChunkBeats,
  kPoolD,
  kPoolH,
  kPoolW,
  kHasShortcut,
  kShortcutD,
  kShortcutH,
  kShortcutW,
  kShortcutZero,
  kShortcutMult,
  kShortcutShift,
  kOutZero,
  kLow,
  kHigh,
  kWide,
  kReserved,
  kFields,
};

}  // namespace kgrc

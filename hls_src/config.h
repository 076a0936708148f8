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
  kSumBits = 32,
  kMinFeatureRows = 4,
  kRequestsAhead = 16,
  kRunsAhead = 32,
  kRegionDistance = 4,
};

static const unsigned long long kDigest = 0xc458a0c832c5dd7fULL;

enum Kind {
  kConvolution,
  kMaxPool,
  kSumPool,
};

// The fields of a task's descriptor, 32 bits each.
enum Field {
  kKind,
  kSource,
  kTarget,
  kShortcut,
  kEvenWeights,
  kOddWeights,
  kIndices,
  kItems,
  kScales,
  kItemCount,
  kRegions,
  kVectors,
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
  kFields,
};

// The words of a task's status, 64 bits each.
enum Status {
  kStatusDone,
  kStatusArray,
  kStatusInput,
  kStatusWeights,
  kStatusScale,
  kStatusStore,
  kStatusPlan,
  kStatusMacs,
  kStatusInputBeats,
  kStatusShortcutBeats,
  kStatusOutputBeats,
  kStatusWeightBeats,
  kStatusTableWords,
  kStatusInputRequests,
  kStatusShortcutRequests,
  kStatusOutputRequests,
  kStatusWeightRequests,
  kStatusClocks,
  kStatusWords,
};

// The memory ports, in the order of the kernel's arguments.
enum Port {
  kPortInput0,
  kPortInput1,
  kPortShortcut,
  kPortOutput,
  kPortWeights0,
  kPortWeights1,
  kPortTables,
  kPortItems,
  kPortIndices,
  kPortScales,
  kPortStatus,
  kPorts,
};

// The first bit and the width of each field of an item of the plan.
enum ItemBits {
  kItemChannelTileFirst = 0,
  kItemChannelTileBits = 16,
  kItemHeldTileFirst = 16,
  kItemHeldTileBits = 8,
  kItemMaskFirst = 24,
  kItemMaskBits = 16,
  kItemNewRegionFirst = 40,
  kItemNewRegionBits = 1,
  kItemEndBlockFirst = 41,
  kItemEndBlockBits = 1,
  kItemVectorsFirst = 48,
  kItemVectorsBits = 16,
};

// The same of the second word of a filter's scale.
enum ScaleBits {
  kScaleMultFirst = 0,
  kScaleMultBits = 15,
  kScaleShiftFirst = 16,
  kScaleShiftBits = 6,
};

}  // namespace kgrc

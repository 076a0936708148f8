// The plan of a task, and the geometry of its tiles and their regions.
#include "design.h"

namespace kgrc {

// Constants of a task. A region has the positions of a phase along an axis that the tile has
// outputs, and `more` of them.
struct Windows {
  UInt<kStrideBits> stride[3], phases[3];  // phases: min(kernel, stride)
  UInt<kKernelBits> more[3];               // ceil(kernel / stride) - 1
  RegionRow row_wrap_w;
};

static Windows windows_of(const Task& task) {
  Windows windows;
axes:
  for (int axis = 0; axis < 3; ++axis) {
    const int kernel = task[Field(kKernelD + axis)], stride = task[Field(kStrideD + axis)];
    windows.stride[axis] = stride;
    windows.phases[axis] = smaller(kernel, stride);
    windows.more[axis] = quotient(kernel - 1, stride);
  }
  windows.row_wrap_w = int(UInt<kKernelBits + 1>(windows.more[2] + kPf - 1) / kPf);
  return windows;
}

static TileSpan make_span(const Task& task, int d, int h, int w) {
  TileSpan span;
  const UInt<kLengthBits> number[3] = {UInt<kLengthBits>(d), UInt<kLengthBits>(h),
                                       UInt<kLengthBits>(w)};
axes:
  for (int axis = 0; axis < 3; ++axis) {
    const UInt<kSizeBits> size = task[Field(kTileD + axis)];
    const int out = task[Field(kOutD + axis)], first = int(number[axis] * size);
    span.first[axis] = first;
    span.size[axis] = smaller(int(size), out - first);
  }
  return span;
}

// Addresses from a row of a phase to the next, and from a plane to the next: padded to the next
// length that is congruent to the outputs, modulo P_F.
struct Pitches {
  UInt<kRegionBits> pitch, plane;
  RegionRow row_wrap_h;
};

static Pitches make_pitches(const Windows& windows, const TileSpan& span) {
  Pitches pitches;
  pitches.pitch = int(span.size[2]) + int(windows.row_wrap_w) * kPf;
  const UInt<kRegionBits> more = windows.more[1] * pitches.pitch;
  pitches.row_wrap_h = int(UInt<kRegionBits + 1>(more + kPf - 1) / kPf);
  const UInt<kRegionBits> rows = span.size[1] * pitches.pitch;
  pitches.plane = int(rows) + int(pitches.row_wrap_h) * kPf;
  return pitches;
}

static Place place_of(const UInt<kStrideBits + kRegionBits>& address) {
  Place place;
  const int row = int(address / kPf);
  place.bank = int(address) - row * kPf;
  place.row = row & ((1 << kRegionRowBits) - 1);
  return place;
}

static Layout make_layout(const Windows& windows, const TileSpan& span, const Pitches& pitches) {
  const UInt<kSizeBits + 1> extent = int(span.size[0]) + int(windows.more[0]);
  const UInt<kRegionBits> phase = extent * pitches.plane;
  const UInt<kRegionBits> phases_h = windows.phases[2] * phase;
  // beyond a region where there is one phase along the depth: not used then
  const UInt<kRegionBits> phases_d = windows.phases[1] * phases_h;
  Layout layout;
  layout.span = span;
  layout.plane = place_of(pitches.plane);
  layout.pitch = place_of(pitches.pitch);
  layout.column = place_of(1);
  layout.phase[0] = place_of(phases_d);
  layout.phase[1] = place_of(phases_h);
  layout.phase[2] = place_of(phase);
  const UInt<kStrideBits + kRegionBits> round = windows.stride[2] * phase;
  layout.round = place_of(round);
  return layout;
}

static Tile make_tile(const Windows& windows, const TileSpan& span, const Pitches& pitches) {
  Tile tile;
  for (int axis = 0; axis < 3; ++axis) tile.size[axis] = span.size[axis];
  const UInt<kTileBits> plane = span.size[0] * span.size[1];
  tile.feature_rows = ceil_div(int(plane * span.size[2]), kPf);
  tile.row_wrap_w = windows.row_wrap_w;
  tile.row_wrap_h = pitches.row_wrap_h;
  UInt<kTileBits> at[3] = {0, 0, 0};
  RegionRow row = 0;
lanes:
  for (int lane = 0; lane < kPf; ++lane) {
    for (int axis = 0; axis < 3; ++axis) tile.lane_at[lane][axis] = at[axis];
    tile.lane_row[lane] = row;
    const bool wraps_w = at[2] + 1 == span.size[2], wraps_h = wraps_w && at[1] + 1 == span.size[1];
    at[2] = wraps_w ? 0 : int(at[2]) + 1;
    at[1] = wraps_h ? 0 : int(at[1]) + (wraps_w ? 1 : 0);
    at[0] += wraps_h ? 1 : 0;
    row += (wraps_w ? int(tile.row_wrap_w) : 0) + (wraps_h ? int(tile.row_wrap_h) : 0);
  }
  // output P_F is in lane 0 again, a row further
  for (int axis = 0; axis < 3; ++axis) tile.step[axis] = at[axis];
  tile.row_step = row + 1;
  return tile;
}

Region make_region(const Task& task, const TileSpan& span) {
  Region region;
axes:
  for (int axis = 0; axis < 3; ++axis) {
    const UInt<kStrideBits> stride = task[Field(kStrideD + axis)];
    region.stride[axis] = stride;
    region.kernel[axis] = task[Field(kKernelD + axis)];
    region.begin[axis] = int(span.first[axis] * stride) - task[Field(kPadD + axis)];
  }
  for (int axis = 0; axis < 2; ++axis) {
    const UInt<kKernelBits> kernel = region.kernel[axis];
    const UInt<kStrideBits> stride = region.stride[axis];
    region.rows[axis] = kernel < stride
                            ? int(span.size[axis] * kernel)
                            : int(UInt<kSizeBits>(span.size[axis] - 1) * stride) + int(kernel);
  }
  region.width = int(UInt<kSizeBits>(span.size[2] - 1) * UInt<kStrideBits>(region.stride[2])) +
                 region.kernel[2];
  // P is a power of two: shifts, also of positions in the padding
  region.first_beat = region.begin[2] >> kBeatShift;
  region.beats = ((region.begin[2] + region.width - 1) >> kBeatShift) - region.first_beat + 1;
  region.row_beats = beats_of_row(task[kInW]);
  return region;
}

// Takes the items once for each output tile. Every process that follows the plan gets its own copy
// of what it needs of the tiles, and of the items.
void read_plan(const Task& task, Stream<Word64>& item_words, Stream<TileSpan>& tiles_to_list,
               Stream<Layout>& tiles_to_place, Stream<Layout>& tiles_to_decode,
               Stream<Tile>& tiles_to_inputs, Stream<TileSpan>& tiles_to_scale,
               Stream<TileSpan>& tiles_to_pack, Stream<Item>& items_to_list,
               Stream<Item>& items_to_place, Stream<Item>& items_to_decode,
               Stream<Item>& items_to_schedule, Stream<Item>& items_to_inputs, long& trips) {
  const Windows windows = windows_of(task);
  const int tiles[3] = {tiles_along(task, 0), tiles_along(task, 1), tiles_along(task, 2)};
tiles_d:
  for (int d = 0; d < tiles[0]; ++d)
  tiles_h:
    for (int h = 0; h < tiles[1]; ++h)
    tiles_w:
      for (int w = 0; w < tiles[2]; ++w) {
        const TileSpan span = make_span(task, d, h, w);
        const Pitches pitches = make_pitches(windows, span);
        const Layout layout = make_layout(windows, span, pitches);
        tiles_to_list.write(span);
        tiles_to_place.write(layout);
        tiles_to_decode.write(layout);
        tiles_to_inputs.write(make_tile(windows, span, pitches));
        tiles_to_scale.write(span);
        tiles_to_pack.write(span);
      items:
        for (int i = 0; i < task[kItemCount]; ++i) {
      // II = 1: nothing is carried from one item to the next
#pragma HLS PIPELINE II = 1
          KGRC_TRIP();
          const Word64 word64 = item_words.read();
          Item item;
          item.channel_tile = bit_field(word64, kItemChannelTileFirst, kItemChannelTileBits);
          item.held_tile = bit_field(word64, kItemHeldTileFirst, kItemHeldTileBits);
          item.mask = bit_field(word64, kItemMaskFirst, kItemMaskBits);
          item.new_region = bit_field(word64, kItemNewRegionFirst, kItemNewRegionBits) != 0;
          item.end_block = bit_field(word64, kItemEndBlockFirst, kItemEndBlockBits) != 0;
          item.vectors = bit_field(word64, kItemVectorsFirst, kItemVectorsBits);
          item.first = i == 0;
          items_to_list.write(item);
          items_to_place.write(item);
          items_to_decode.write(item);
          items_to_schedule.write(item);
          items_to_inputs.write(item);
          ++trips;
        }
      }
}

}  // namespace kgrc

// The plan of a task, and the geometry of its tiles and their regions.
#include "design.h"

namespace kgrc {

// Tile number (d, h, w) along the axes.
Tile make_tile(const Task& task, int d, int h, int w) {
  Tile tile;
  const int number[3] = {d, h, w};
  int extent[3];  // positions of a phase along each axis
axes:
  for (int axis = 0; axis < 3; ++axis) {
    const int size = task[Field(kTileD + axis)], out = task[Field(kOutD + axis)];
    const int kernel = task[Field(kKernelD + axis)], stride = task[Field(kStrideD + axis)];
    tile.first[axis] = number[axis] * size;
    tile.size[axis] = smaller(size, out - tile.first[axis]);
    tile.phases[axis] = smaller(kernel, stride);
    extent[axis] = ceil_div((tile.size[axis] - 1) * stride + kernel, stride);
  }
  const int nh = tile.size[1], nw = tile.size[2];
  // padded to the next length that is congruent to the outputs, modulo P_F
  tile.pitch = extent[2] + (nw - extent[2] % kPf + kPf * kTw * kPf) % kPf;
  tile.plane = extent[1] * tile.pitch;
  tile.plane += (nh * nw - tile.plane % kPf + kPf * kTh * kTw * kPf) % kPf;
  tile.phase_size = extent[0] * tile.plane;
  tile.feature_rows = ceil_div(tile.size[0] * nh * nw, kPf);
  tile.step[2] = kPf % nw;
  tile.step[1] = kPf / nw % nh;
  tile.step[0] = kPf / nw / nh;
  tile.row_wrap_w = (tile.pitch - nw) / kPf;
  tile.row_wrap_h = (tile.plane - nh * tile.pitch) / kPf;
  tile.row_step = 1 + kPf / nw * tile.row_wrap_w + tile.step[0] * tile.row_wrap_h;
lanes:
  for (int i = 0; i < kPf; ++i) {
    const int at[3] = {i / nw / nh, i / nw % nh, i % nw};
    for (int axis = 0; axis < 3; ++axis) tile.lane_at[i][axis] = at[axis];
    tile.lane_row[i] = (at[0] * tile.plane + at[1] * tile.pitch + at[2] - i) / kPf;
  }
  return tile;
}

Region make_region(const Task& task, const Tile& tile) {
  Region region;
axes:
  for (int axis = 0; axis < 3; ++axis) {
    region.stride[axis] = task[Field(kStrideD + axis)];
    region.kernel[axis] = task[Field(kKernelD + axis)];
    region.begin[axis] = tile.first[axis] * region.stride[axis] - task[Field(kPadD + axis)];
  }
  for (int axis = 0; axis < 2; ++axis)
    region.rows[axis] = region.kernel[axis] < region.stride[axis]
                            ? tile.size[axis] * region.kernel[axis]
                            : (tile.size[axis] - 1) * region.stride[axis] + region.kernel[axis];
  region.width = (tile.size[2] - 1) * region.stride[2] + region.kernel[2];
  region.first_beat = floor_div(region.begin[2], kPortPositions);
  region.beats = floor_div(region.begin[2] + region.width - 1, kPortPositions) - region.first_beat +
                 1;
  region.row_beats = beats_of_row(task[kInW]);
  return region;
}

// Takes the items once for each output tile. Every process that follows the plan gets its own copy
// of the tiles, and of the items where it needs them.
void read_plan(const Task& task, Stream<Word64>& item_words, Stream<Tile>& tiles_to_list,
               Stream<Tile>& tiles_to_place, Stream<Tile>& tiles_to_decode,
               Stream<Tile>& tiles_to_inputs, Stream<Tile>& tiles_to_scale,
               Stream<Tile>& tiles_to_pack, Stream<Item>& items_to_list,
               Stream<Item>& items_to_place, Stream<Item>& items_to_decode,
               Stream<Item>& items_to_schedule, Stream<Item>& items_to_inputs, long& trips) {
tiles_d:
  for (int d = 0; d < tiles_along(task, 0); ++d)
  tiles_h:
    for (int h = 0; h < tiles_along(task, 1); ++h)
    tiles_w:
      for (int w = 0; w < tiles_along(task, 2); ++w) {
        const Tile tile = make_tile(task, d, h, w);
        tiles_to_list.write(tile);
        tiles_to_place.write(tile);
        tiles_to_decode.write(tile);
        tiles_to_inputs.write(tile);
        tiles_to_scale.write(tile);
        tiles_to_pack.write(tile);
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

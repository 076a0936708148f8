// The array: each step is a trip, unless it waits for a stream. A trip does three things at once:
// it multiplies one weight word with the inputs of PF outputs, it loads one word of the next
// region, and it hands on one word of finished sums. For convolutions it is the twin, trip by trip, of
// schedule(), address_inputs() and address_sums() in ../schedule.cpp with multiply() in ../compute.cpp.
//
// A stream passes a word where valid and ready are both high. The first field of a word is in its
// lowest bits; in [a][b] a is outermost:
//
//   tile    struct Tile, taken with the first item of an output tile: size[3], feature_rows,
//           step[3], row_step, row_wrap_w, row_wrap_h, lane_at[PF][3], lane_row[PF]
//   item    struct Item: held_tile, mask, new_region, end_block, first, vectors
//   region  struct RegionWord: last, valid[POSITIONS], {row, bank}[POSITIONS],
//           code[POSITIONS][TN]
//   word    struct WeightWord: code[GROUPS][ROWS][PK][TN], {row, bank}[GROUPS][PK] (only of the
//           first group in a dense design), row[GROUPS][ROWS]
//   sums    struct SumWord: sum[POSITIONS][TN]
//
// A job begins with `start` while not busy. It has ended when busy falls: LATENCY clocks after its
// last trip, LATENCY = min(TN, 8) + 11. rst clears the sums and has to be held for LATENCY clocks.
//
// The parameters of a design come from verilog_parameters() in pynq_kgrc/accelerator/header.py.
// Those without a sensible default are 0 here and have to be given.
module mac_array #(
  parameter BITS = 8, SPARSE = 1, TM = 8, GM = 4, TN = 4, PM = 4, PK = 3, PF = 5,
  parameter POSITIONS = 4, REGION_ROWS = 1024, FEATURE_ROWS = 10, FILTER_TILES = 2,
  parameter SUM = 0,         // bits of a sum
  parameter MIN_ROWS = 0,    // least trips between two accesses to a sum; see sum_bank.v
  parameter REGION_DISTANCE = 0,   // from the last write of a region to its first read
  parameter PACKED = 1
) (clk, rst, start, words_of_item, item_count, region_count, busy, trips,
   tile_valid, tile_ready, tile, item_valid, item_ready, item,
   region_valid, region_ready, region, word_valid, word_ready, word,
   sums_valid, sums_ready, sums);

  // bits of a number from 0 to `most`
  function integer bits_for(input integer most);
    begin
      bits_for = 1;
      while ((most >> bits_for) > 0) bits_for = bits_for + 1;
    end
  endfunction

  localparam GROUPS = TM / GM, ROWS = PM / GROUPS, VECTORS = TM / TN;
  localparam SUM_ROWS = FILTER_TILES * FEATURE_ROWS;
  localparam READS = (SPARSE ? GROUPS : 1) * PK, COPIES = (READS + 1) / 2;
  localparam WEIGHTS = BITS == 16 ? 1 : 2, FEATURES = BITS == 4 ? 2 : 1;   // of a dot
  localparam DOT = 2 * BITS + 8;
  localparam TOTAL = DOT + bits_for(PK);
  // widths of numbers
  localparam CODES = TN * BITS;
  localparam ROW = bits_for(REGION_ROWS - 1), BANK = bits_for(PF - 1), PLACE = ROW + BANK;
  localparam SUM_ROW = bits_for(SUM_ROWS - 1), FEATURE = bits_for(FEATURE_ROWS + MIN_ROWS);
  localparam WAIT = bits_for(REGION_DISTANCE);
  localparam SIZE = bits_for(PF * (FEATURE_ROWS + 8));
  localparam FILTER = bits_for(GM - 1), VECTOR = bits_for(VECTORS - 1);
  localparam HELD = bits_for(FILTER_TILES - 1), HANDED = bits_for(FILTER_TILES * VECTORS);
  localparam COUNT = bits_for(POSITIONS);
  // where the fields of words begin
  localparam TILE_ROWS = 3 * SIZE, TILE_STEP = TILE_ROWS + FEATURE;
  localparam TILE_MOVE = TILE_STEP + 3 * SIZE;
  localparam TILE_AT = TILE_MOVE + 3 * ROW, TILE_LANE = TILE_AT + PF * 3 * SIZE;
  localparam TILE = TILE_LANE + PF * ROW;
  localparam ITEM_MASK = HELD, ITEM_FLAGS = ITEM_MASK + GROUPS, ITEM_VECTORS = ITEM_FLAGS + 3;
  localparam ITEM = ITEM_VECTORS + HANDED;
  localparam REGION_PLACE = 1 + POSITIONS, REGION_CODE = REGION_PLACE + POSITIONS * PLACE;
  localparam REGION = REGION_CODE + POSITIONS * CODES;
  localparam WORD_PLACE = GROUPS * ROWS * PK * CODES, WORD_ROW = WORD_PLACE + READS * PLACE;
  localparam WORD = WORD_ROW + GROUPS * ROWS * FILTER;

  input clk, rst, start;
  input [15:0] words_of_item;
  input [31:0] item_count, region_count;
  output busy;
  output reg [31:0] trips;
  input tile_valid, item_valid, region_valid, word_valid, sums_ready;
  output tile_ready, item_ready, region_ready, word_ready;
  input [TILE-1:0] tile;
  input [ITEM-1:0] item;
  input [REGION-1:0] region;
  input [WORD-1:0] word;
  output reg sums_valid;
  output [POSITIONS*TN*SUM-1:0] sums;

  // ---- the state of a trip, and that of the next one -------------------------------------------

  reg [31:0] items_left, regions_left;
  reg [15:0] item_words, words_left;
  reg have_next, active, block_done, draining, emptied, in_use, sums_in_use, load_into, in_flight,
      holds_region;
  reg [1:0] full;
  reg [WAIT-1:0] ready_in [0:1];      // trips until a full half may be read
  reg [ITEM-1:0] held_item, next_item;
  reg [TILE-1:0] held_tile;
  reg [FEATURE-1:0] feature_row;
  reg [PF*3*SIZE-1:0] held_at;
  reg [PF*ROW-1:0] held_lane_row;
  reg [HANDED-1:0] vectors_left;
  reg [VECTOR-1:0] vector;
  reg [SIZE-1:0] d, h, left, drain_d, drain_h, drain_w;
  reg [SUM_ROW-1:0] drain_first, drain_row;
  reg [BANK-1:0] drain_lane;
  reg [FEATURE-1:0] settling;
  reg wiping;
  reg [SUM_ROW-1:0] wipe_row;

  // back-pressure: the pipeline stops while a sum is not taken, and runs empty while an input is
  // late
  wire step = !sums_valid || sums_ready;
  wire running = items_left != 0 || active || block_done || draining;
  assign busy = running || in_flight;

  // begin to hand on the sums of a finished block
  wire begin_drain = block_done && !draining;
  wire waits = block_done && draining;
  wire drain_now = draining || begin_drain;
  wire handing = drain_now && !emptied;
  wire sums_now = sums_in_use ^ begin_drain;

  // the next item
  wire take_item = !have_next && items_left != 0 && !active;
  wire [ITEM-1:0] next_now = take_item ? item : next_item;
  wire begin_item = (have_next || take_item) && !active && !waits
                    && (!next_now[ITEM_FLAGS] || full[!in_use] && ready_in[!in_use] == 0);
  wire [ITEM-1:0] item_now = begin_item ? next_now : held_item;
  wire [HELD-1:0] filter_tile = item_now[0 +: HELD];  // among those whose sums are held
  wire [GROUPS-1:0] mask = item_now[ITEM_MASK +: GROUPS];
  wire end_block = item_now[ITEM_FLAGS+1];
  wire take_tile = begin_item && item_now[ITEM_FLAGS+2];
  wire [TILE-1:0] tile_now = take_tile ? tile : held_tile;
  wire turn = begin_item && item_now[ITEM_FLAGS];
  wire in_use_now = in_use ^ turn;
  // before the first region is used, the other buffer may hold the second one already
  wire frees = turn && holds_region;
  wire [1:0] full_now = {full[1] && !(frees && in_use), full[0] && !(frees && !in_use)};
  wire [15:0] words_now = !begin_item ? words_left : mask != 0 ? item_words : 16'd0;
  wire active_now = begin_item ? words_now != 0 : active;
  wire [FEATURE-1:0] feature_now = begin_item ? {FEATURE{1'b0}} : feature_row;

  // the next word of weights, and the last trip with it
  wire take_word = active_now && feature_now == 0;
  wire [FEATURE-1:0] feature_rows = tile_now[TILE_ROWS +: FEATURE];
  wire [FEATURE-1:0] rows_now = feature_rows < MIN_ROWS ? MIN_ROWS : feature_rows;
  wire last_row = feature_now + 1'b1 == rows_now;
  wire last_word = active_now && last_row && words_now == 1;

  wire take_region = regions_left != 0 && !full_now[load_into];

  wire go = running && step && (!take_item || item_valid) && (!take_tile || tile_valid)
            && (!take_word || word_valid) && (!take_region || region_valid);
  assign item_ready = go && take_item;
  assign tile_ready = go && take_tile;
  assign word_ready = go && take_word;
  assign region_ready = go && take_region;

  // the outputs of the lanes: their coordinates in the tile, and their row in the region
  reg [PF*3*SIZE-1:0] at_now, at_next;
  reg [PF*ROW-1:0] lane_row_now, lane_row_next;
  reg [PF-1:0] exists;
  reg [SIZE-1:0] at_d, at_h, at_w;
  reg [ROW-1:0] row_of_lane;
  integer lane;
  always @* begin
    at_now = take_word ? tile_now[TILE_AT +: PF*3*SIZE] : held_at;
    lane_row_now = take_word ? tile_now[TILE_LANE +: PF*ROW] : held_lane_row;
    for (lane = 0; lane < PF; lane = lane + 1) begin
      {at_w, at_h, at_d} = at_now[lane*3*SIZE +: 3*SIZE];
      exists[lane] = at_d < tile_now[0 +: SIZE];
      row_of_lane = lane_row_now[lane*ROW +: ROW] + tile_now[TILE_MOVE +: ROW];
      at_w = at_w + tile_now[TILE_STEP+2*SIZE +: SIZE];
      if (at_w >= tile_now[2*SIZE +: SIZE]) begin
        at_w = at_w - tile_now[2*SIZE +: SIZE];
        at_h = at_h + 1'b1;
        row_of_lane = row_of_lane + tile_now[TILE_MOVE+ROW +: ROW];
      end
      at_h = at_h + tile_now[TILE_STEP+SIZE +: SIZE];
      if (at_h >= tile_now[SIZE +: SIZE]) begin
        at_h = at_h - tile_now[SIZE +: SIZE];
        at_d = at_d + 1'b1;
        row_of_lane = row_of_lane + tile_now[TILE_MOVE+2*ROW +: ROW];
      end
      at_d = at_d + tile_now[TILE_STEP +: SIZE];
      at_next[lane*3*SIZE +: 3*SIZE] = {at_w, at_h, at_d};
      lane_row_next[lane*ROW +: ROW] = row_of_lane;
    end
  end

  // the first row of the sums of a held tile: filter_tile * FEATURE_ROWS
  reg [SUM_ROW-1:0] first_row;
  integer s;
  always @* begin
    first_row = {SUM_ROW{1'b0}};
    for (s = 0; s < FILTER_TILES; s = s + 1) if (filter_tile == s) first_row = s * FEATURE_ROWS;
  end

  // the sums that are handed on: POSITIONS neighbouring outputs lie in neighbouring lanes
  wire [SIZE-1:0] drain_w_now = begin_drain ? held_tile[2*SIZE +: SIZE] : drain_w;
  wire [SIZE-1:0] drain_h_now = begin_drain ? held_tile[SIZE +: SIZE] : drain_h;
  wire [SIZE-1:0] drain_d_now = begin_drain ? held_tile[0 +: SIZE] : drain_d;
  wire [SIZE-1:0] left_now = begin_drain ? drain_w_now : left;
  wire [SIZE-1:0] h_now = begin_drain ? {SIZE{1'b0}} : h;
  wire [SIZE-1:0] d_now = begin_drain ? {SIZE{1'b0}} : d;
  wire [HANDED-1:0] vectors_now = begin_drain ? held_item[ITEM_VECTORS +: HANDED] : vectors_left;
  wire [VECTOR-1:0] vector_now = begin_drain ? {VECTOR{1'b0}} : vector;
  wire [SUM_ROW-1:0] drain_first_now = begin_drain ? {SUM_ROW{1'b0}} : drain_first;
  wire [SUM_ROW-1:0] drain_row_now = begin_drain ? {SUM_ROW{1'b0}} : drain_row;
  wire [BANK-1:0] drain_lane_now = begin_drain ? {BANK{1'b0}} : drain_lane;
  wire [COUNT-1:0] count = left_now < POSITIONS ? left_now[COUNT-1:0] : POSITIONS;
  wire [SIZE-1:0] lanes_on = drain_lane_now + count;
  wire wraps = lanes_on >= PF;
  wire row_ends = left_now <= POSITIONS;
  wire plane_ends = row_ends && h_now + 1'b1 == drain_h_now;
  wire vector_ends = plane_ends && d_now + 1'b1 == drain_d_now;
  wire last_handed = handing && vector_ends && vectors_now == 1;
  // where a tile has few rows, wait until the sums that were cleared may be added to
  wire [FEATURE-1:0] rows_drained = held_tile[TILE_ROWS +: FEATURE];
  wire [FEATURE-1:0] settling_now = !begin_drain ? settling
                                  : rows_drained > MIN_ROWS ? {FEATURE{1'b0}}
                                  : MIN_ROWS + 1 - rows_drained;
  wire drain_ends = emptied ? settling == 1 : last_handed && settling_now == 0;
  wire [BANK-1:0] lane_next = wraps ? lanes_on - PF : lanes_on;

  wire region_ends = take_region && region[0];
  wire trip_is_last = items_left == (begin_item ? 1 : 0) && (!active_now || last_word)
                      && !(active_now && last_word && end_block)
                      && !(begin_item && !active_now && end_block) && !waits
                      && (!drain_now || drain_ends);

  integer half_at;
  always @(posedge clk) begin
    if (rst) begin
      items_left <= 0;
      regions_left <= 0;
      have_next <= 0;
      active <= 0;
      block_done <= 0;
      draining <= 0;
      emptied <= 0;
    end else if (start && !busy) begin
      items_left <= item_count;
      regions_left <= region_count;
      item_words <= words_of_item;
      have_next <= 0;
      in_use <= 1;
      holds_region <= 0;
      sums_in_use <= 0;
      load_into <= 0;
      full <= 2'b00;
      ready_in[0] <= {WAIT{1'b0}};
      ready_in[1] <= {WAIT{1'b0}};
      trips <= 0;
    end else if (go) begin
      trips <= trips + 1;
      sums_in_use <= sums_now;
      have_next <= (have_next || take_item) && !begin_item;
      next_item <= next_now;
      held_item <= item_now;
      held_tile <= tile_now;
      in_use <= in_use_now;
      holds_region <= holds_region || turn;
      if (begin_item) items_left <= items_left - 1;

      active <= active_now && !last_word;
      block_done <= begin_item && !active_now ? end_block : last_word ? end_block : waits;
      words_left <= active_now && last_row ? words_now - 1 : words_now;
      feature_row <= last_row ? {FEATURE{1'b0}} : active_now ? feature_now + 1'b1 : feature_now;
      if (active_now) begin
        held_at <= at_next;
        held_lane_row <= lane_row_next;
      end

      draining <= drain_now && !drain_ends;
      emptied <= (emptied || last_handed) && !drain_ends;
      settling <= emptied ? settling - 1'b1 : settling_now;
      drain_w <= drain_w_now;
      drain_h <= drain_h_now;
      drain_d <= drain_d_now;
      if (handing) begin
        left <= row_ends ? drain_w_now : left_now - POSITIONS;
        h <= plane_ends ? {SIZE{1'b0}} : row_ends ? h_now + 1'b1 : h_now;
        d <= vector_ends ? {SIZE{1'b0}} : plane_ends ? d_now + 1'b1 : d_now;
        drain_lane <= vector_ends ? {BANK{1'b0}} : lane_next;
        drain_row <= vector_ends ? {SUM_ROW{1'b0}} : wraps ? drain_row_now + 1'b1 : drain_row_now;
        vectors_left <= vector_ends ? vectors_now - 1'b1 : vectors_now;
        vector <= !vector_ends ? vector_now : vector_now == VECTORS - 1 ? {VECTOR{1'b0}}
                                                                 : vector_now + 1'b1;
        drain_first <= vector_ends && vector_now == VECTORS - 1 ? drain_first_now + FEATURE_ROWS
                                                            : drain_first_now;
      end

      full <= full_now | {region_ends && load_into, region_ends && !load_into};
      for (half_at = 0; half_at < 2; half_at = half_at + 1)
        ready_in[half_at] <= region_ends && load_into == half_at ? REGION_DISTANCE - 1
                           : ready_in[half_at] != 0 ? ready_in[half_at] - 1'b1 : {WAIT{1'b0}};
      if (region_ends) begin
        load_into <= !load_into;
        regions_left <= regions_left - 1;
      end
    end
  end

  // sums are cleared after a reset, and then as they are handed on
  always @(posedge clk) begin
    if (rst) begin
      wiping <= 1;
      wipe_row <= {SUM_ROW{1'b0}};
    end else if (step && wiping) begin
      wiping <= wipe_row != SUM_ROWS - 1;
      wipe_row <= wipe_row + 1'b1;
    end
  end

  // ---- stage 1: the trip -----------------------------------------------------------------------

  reg compute1, drain1, load1, load_half1, half1, sums1, wipe1, last1;
  reg [PF*ROW-1:0] lane_row1;
  reg [PF-1:0] exists1;
  reg [GROUPS-1:0] mask1;
  reg [SUM_ROW-1:0] sum_row1, drain_row1;
  reg [BANK-1:0] drain_lane1;
  reg [COUNT-1:0] count1;
  reg [VECTOR-1:0] vector1;
  reg [WORD-1:0] word1;
  reg [REGION-1:0] region1;
  integer e;
  always @(posedge clk) if (step) begin
    compute1 <= go && active_now && feature_now < feature_rows;
    drain1 <= go && handing;
    load1 <= go && take_region;
    wipe1 <= wiping && !rst;
    last1 <= !rst && (go ? trip_is_last : wiping && wipe_row == SUM_ROWS - 1);
    load_half1 <= load_into;
    half1 <= in_use_now;
    sums1 <= sums_now;
    // lanes past the last output of the tile read row 0 and add to nothing
    for (e = 0; e < PF; e = e + 1)
      lane_row1[e*ROW +: ROW] <= exists[e] ? lane_row_now[e*ROW +: ROW] : {ROW{1'b0}};
    exists1 <= exists;
    mask1 <= mask;
    sum_row1 <= wiping ? wipe_row : first_row + feature_now;
    drain_row1 <= drain_first_now + drain_row_now;
    drain_lane1 <= drain_lane_now;
    count1 <= count;
    vector1 <= vector_now;
    if (take_word) word1 <= word;
    region1 <= region;
  end

  // ---- stages 2 and 3: the regions -------------------------------------------------------------

  // Two regions (double-buffered), each in as many copies as the reads of a trip need with two
  // ports a bank. At one tap, bank b holds the input of output b - offset. A word of the next
  // region writes to a bank twice at most.
  wire [ROW-1:0] read_row1 [0:READS*PF-1];       // [read][bank]
  wire [PF-1:0] write_a1, write_b1;
  wire [ROW-1:0] write_row_a1 [0:PF-1];
  wire [ROW-1:0] write_row_b1 [0:PF-1];
  wire [CODES-1:0] code_a1 [0:PF-1];
  wire [CODES-1:0] code_b1 [0:PF-1];
  wire [CODES-1:0] read3 [0:2*READS*PF-1];       // [half][read][bank]
  genvar half, copy, bank, read, l;
  generate
    for (read = 0; read < READS; read = read + 1) begin : reads
      wire [BANK-1:0] offset = word1[WORD_PLACE + read*PLACE + ROW +: BANK];
      wire [ROW-1:0] offset_row = word1[WORD_PLACE + read*PLACE +: ROW];
      for (bank = 0; bank < PF; bank = bank + 1) begin : banks
        reg [ROW-1:0] found;
        integer i;
        always @* begin
          found = {ROW{1'b0}};
          for (i = 0; i < PF; i = i + 1)         // lanes; those beyond the bank have wrapped around
            if (offset == (bank - i + PF) % PF)
              found = lane_row1[i*ROW +: ROW] + offset_row + (i > bank ? 1'b1 : 1'b0);
        end
        assign read_row1[read*PF + bank] = found;
      end
    end
    for (bank = 0; bank < PF; bank = bank + 1) begin : writes
      reg a, b;
      reg [ROW-1:0] row_a, row_b;
      reg [CODES-1:0] in_a, in_b;
      integer i;
      always @* begin
        {a, b, row_a, row_b, in_a, in_b} = {2 + 2*ROW + 2*CODES{1'b0}};
        for (i = 0; i < POSITIONS; i = i + 1)
          if (load1 && region1[1+i] && region1[REGION_PLACE + i*PLACE + ROW +: BANK] == bank) begin
            b = a;
            row_b = region1[REGION_PLACE + i*PLACE +: ROW];
            in_b = region1[REGION_CODE + i*CODES +: CODES];
            if (!a) begin
              a = 1'b1;
              row_a = row_b;
              in_a = in_b;
            end
          end
      end
      assign write_a1[bank] = a;
      assign write_b1[bank] = b;
      assign write_row_a1[bank] = row_a;
      assign write_row_b1[bank] = row_b;
      assign code_a1[bank] = in_a;
      assign code_b1[bank] = in_b;
    end
    for (half = 0; half < 2; half = half + 1) begin : halves
      for (copy = 0; copy < COPIES; copy = copy + 1) begin : copies
        for (bank = 0; bank < PF; bank = bank + 1) begin : banks
          localparam READ_A = 2 * copy, READ_B = 2 * copy + 1 < READS ? 2 * copy + 1 : 2 * copy;
          reg loads_a, loads_b;
          reg [ROW-1:0] row_a, row_b;
          reg [CODES-1:0] in_a, in_b;
          always @(posedge clk) if (step) begin
            loads_a <= load_half1 == half && write_a1[bank];
            loads_b <= load_half1 == half && write_b1[bank];
            row_a <= load_half1 == half && write_a1[bank] ? write_row_a1[bank]
                                                          : read_row1[READ_A*PF + bank];
            row_b <= load_half1 == half && write_b1[bank] ? write_row_b1[bank]
                                                          : read_row1[READ_B*PF + bank];
            in_a <= code_a1[bank];
            in_b <= code_b1[bank];
          end
          // with an odd number of reads, the last copy has a port without use
          /* verilator lint_off UNUSEDSIGNAL */
          wire [CODES-1:0] out_a, out_b;
          /* verilator lint_on UNUSEDSIGNAL */
          region_bank #(.ROWS(REGION_ROWS), .WIDTH(CODES), .ROW(ROW)) memory
              (clk, step, loads_a, loads_b, row_a, row_b, in_a, in_b, out_a, out_b);
          assign read3[(half*READS + READ_A)*PF + bank] = out_a;
          if (READ_B != READ_A) begin : second
            assign read3[(half*READS + READ_B)*PF + bank] = out_b;
          end
        end
      end
    end
  endgenerate

  // ---- stage 4: back to the lanes --------------------------------------------------------------

  wire half3;
  delay #(.WIDTH(1), .CYCLES(2)) to_half (clk, step, half1, half3);
  wire [WORD_PLACE-1:0] weights4;
  delay #(.WIDTH(WORD_PLACE), .CYCLES(3)) to_dots
      (clk, step, word1[0 +: WORD_PLACE], weights4);

  wire [CODES-1:0] seen4 [0:READS*PF-1];         // [read][lane]
  generate
    for (read = 0; read < READS; read = read + 1) begin : rotations
      wire [BANK-1:0] offset;
      delay #(.WIDTH(BANK), .CYCLES(2)) to_rotation
          (clk, step, word1[WORD_PLACE + read*PLACE + ROW +: BANK], offset);
      for (l = 0; l < PF; l = l + 1) begin : lanes
        reg [CODES-1:0] seen;
        integer i;
        always @(posedge clk) if (step)
          for (i = 0; i < PF; i = i + 1)         // banks
            if (offset == (i - l + PF) % PF)
              seen <= half3 ? read3[(READS + read)*PF + i] : read3[read*PF + i];
        assign seen4[read*PF + l] = seen;
      end
    end
  endgenerate

  // What a trip does with the sums passes through the pipeline beside its products.
  localparam DRAINS = SUM_ROW + BANK + COUNT + VECTOR + 1;
  localparam ADDS = SUM_ROW + PF + GROUPS + GROUPS * ROWS * FILTER;
  localparam TAG = DRAINS + ADDS + 3;
  wire compute4, compute_d;
  wire [TAG-1:0] tag4, tag_dot;
  delay #(.WIDTH(TAG + 1), .CYCLES(3)) to_tag (clk, step,
      {last1, wipe1, sums1,
       drain_row1, drain_lane1, count1, vector1, drain1,
       sum_row1, exists1, mask1, word1[WORD_ROW +: GROUPS*ROWS*FILTER], compute1},
      {tag4, compute4});

  // ---- the dot products, and their totals over the columns of a trip ---------------------------

  wire [TOTAL-1:0] totals [0:GROUPS*ROWS*PF-1];  // [group][row][lane]
  genvar g, row, f, k, o, n;
  generate
    for (g = 0; g < GROUPS; g = g + 1) begin : groups
      for (row = 0; row < ROWS; row = row + WEIGHTS) begin : rows
        for (f = 0; f < PF; f = f + FEATURES) begin : features
          wire [PK*WEIGHTS*FEATURES*DOT-1:0] products;
          for (k = 0; k < PK; k = k + 1) begin : taps
            localparam READ = (SPARSE ? g * PK : 0) + k;
            wire [WEIGHTS*CODES-1:0] w;
            wire [FEATURES*CODES-1:0] x;
            for (n = 0; n < WEIGHTS; n = n + 1) begin : filters
              if (row + n < ROWS)
                assign w[n*CODES +: CODES] = weights4[((g*ROWS + row + n)*PK + k)*CODES +: CODES];
              else
                assign w[n*CODES +: CODES] = {CODES{1'b0}};
            end
            for (n = 0; n < FEATURES; n = n + 1) begin : positions
              if (f + n < PF)
                assign x[n*CODES +: CODES] = seen4[READ*PF + f + n];
              else
                assign x[n*CODES +: CODES] = {CODES{1'b0}};
            end
            if (g == 0 && row == 0 && f == 0 && k == 0) begin : tagged
              dot #(.BITS(BITS), .TN(TN), .PACKED(PACKED), .TAG(TAG)) product (
                  clk, step, compute4, tag4, w, x, compute_d, tag_dot,
                  products[k*WEIGHTS*FEATURES*DOT +: WEIGHTS*FEATURES*DOT]);
            end else begin : others
              wire unused_valid, unused_tag;
              dot #(.BITS(BITS), .TN(TN), .PACKED(PACKED)) product (
                  clk, step, 1'b0, 1'b0, w, x, unused_valid, unused_tag,
                  products[k*WEIGHTS*FEATURES*DOT +: WEIGHTS*FEATURES*DOT]);
            end
          end
          for (o = 0; o < WEIGHTS * FEATURES; o = o + 1) begin : outputs
            localparam OF_ROW = row + o / FEATURES, OF_LANE = f + o % FEATURES;
            if (OF_ROW < ROWS && OF_LANE < PF) begin : there
              reg signed [TOTAL-1:0] total, kept;
              reg signed [DOT-1:0] product_k;
              integer t;
              always @* begin
                total = {TOTAL{1'b0}};
                for (t = 0; t < PK; t = t + 1) begin
                  product_k = products[(t*WEIGHTS*FEATURES + o)*DOT +: DOT];
                  total = total + product_k;
                end
              end
              always @(posedge clk) if (step) kept <= total;
              assign totals[(g*ROWS + OF_ROW)*PF + OF_LANE] = kept;
            end
          end
        end
      end
    end
  endgenerate

  // ---- the sums --------------------------------------------------------------------------------

  // Edge 1 of the banks (sum_bank.v) follows the dot products; the totals are ready before edge 3.
  wire last_d, wipe_d, sums_d, handing_d;
  wire [SUM_ROW-1:0] drain_row_d, sum_row_d;
  wire [BANK-1:0] drain_lane_d;
  wire [COUNT-1:0] count_d;
  wire [VECTOR-1:0] vector_d;
  wire [PF-1:0] exists_d;
  wire [GROUPS-1:0] mask_d;
  wire [GROUPS*ROWS*FILTER-1:0] filters_d;
  assign {last_d, wipe_d, sums_d, drain_row_d, drain_lane_d, count_d, vector_d, handing_d,
          sum_row_d, exists_d, mask_d, filters_d} = tag_dot;

  reg [PF-1:0] exists_t;
  reg [GROUPS-1:0] mask_t;
  reg [GROUPS*ROWS*FILTER-1:0] filters_t;
  reg compute_t;
  always @(posedge clk) if (step)
    {exists_t, mask_t, filters_t, compute_t} <= {exists_d, mask_d, filters_d, compute_d};

  wire sums_2, handing_2, last_4;
  wire [BANK-1:0] drain_lane_2;
  wire [COUNT-1:0] count_2;
  wire [VECTOR-1:0] vector_2;
  delay #(.WIDTH(BANK + COUNT + VECTOR + 2), .CYCLES(2)) to_output (clk, step,
      {drain_lane_d, count_d, vector_d, handing_d, sums_d},
      {drain_lane_2, count_2, vector_2, handing_2, sums_2});
  delay #(.WIDTH(1), .CYCLES(4)) to_end (clk, step, last_d, last_4);

  // of each lane: the row that is handed on, and whether this trip hands it on
  reg [PF*SUM_ROW-1:0] drain_rows;
  reg [PF-1:0] handed_on;
  integer u;
  always @*
    for (u = 0; u < PF; u = u + 1) begin
      drain_rows[u*SUM_ROW +: SUM_ROW] = u < drain_lane_d ? drain_row_d + 1'b1 : drain_row_d;
      handed_on[u] = handing_d && (u < drain_lane_d ? u + PF : u) < drain_lane_d + count_d;
    end

  wire [SUM-1:0] found [0:2*TM*PF-1];            // [half][filter][lane]
  genvar side, filter, at, p;
  generate
    for (filter = 0; filter < TM; filter = filter + 1) begin : filters
      for (at = 0; at < PF; at = at + 1) begin : lanes
        // the total of this filter's row, if the trip has one
        localparam GROUP = filter / GM;
        reg add;
        reg signed [TOTAL-1:0] total;
        integer i;
        always @(posedge clk) if (step) begin
          add <= 1'b0;
          for (i = 0; i < ROWS; i = i + 1)
            if (filters_t[(GROUP*ROWS + i)*FILTER +: FILTER] == filter % GM) begin
              add <= compute_t && mask_t[GROUP] && exists_t[at];
              total <= totals[(GROUP*ROWS + i)*PF + at];
            end
        end
        wire signed [SUM-1:0] addend = total;
        for (side = 0; side < 2; side = side + 1) begin : sides
          wire used = sums_d == side || wipe_d;
          sum_bank #(.ROWS(SUM_ROWS), .WIDTH(SUM), .ROW(SUM_ROW)) memory (
              clk, step, used ? sum_row_d : drain_rows[at*SUM_ROW +: SUM_ROW],
              wipe_d || (!used && handed_on[at] && vector_d == filter / TN),
              add && sums_2 == side, addend, found[(side*TM + filter)*PF + at]);
        end
      end
    end
    for (p = 0; p < POSITIONS; p = p + 1) begin : positions
      for (n = 0; n < TN; n = n + 1) begin : channels
        reg [SUM-1:0] sum;
        integer i, v;
        always @(posedge clk) if (step) begin
          sum <= {SUM{1'b0}};
          for (i = 0; i < VECTORS; i = i + 1)
            for (v = 0; v < PF; v = v + 1)       // lanes
              if (p < count_2 && vector_2 == i && drain_lane_2 == (v - p + PF) % PF)
                sum <= sums_2 ? found[(i*TN + n)*PF + v] : found[(TM + i*TN + n)*PF + v];
        end
        assign sums[(p*TN + n)*SUM +: SUM] = sum;
      end
    end
  endgenerate
  always @(posedge clk)
    if (rst) sums_valid <= 0;
    else if (step) sums_valid <= handing_2;

  // busy until the last trip has written its sums
  always @(posedge clk) begin
    if (rst || (start && !busy)) in_flight <= 1;
    else if (step && last_4) in_flight <= 0;
  end
endmodule
